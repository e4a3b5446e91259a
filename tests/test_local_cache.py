"""Training data on a machine's own disk: copied once, verified, used again, removed by age; never in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chain import ROOT
from workflow_src.common.errors import UserError
from workflow_src.training import local_cache
from workflow_src.training.local_cache import VARIABLE, localise


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder of two files, and a cache beside it."""
    folder = tmp_path / "latents" / "train"
    (folder / "deep").mkdir(parents=True)
    (folder / "latents.json").write_text("{}")
    (folder / "deep" / "plain_0.npy").write_bytes(os.urandom(5000))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "$HERE/scratch")
    return folder


def copies(tmp_path: Path) -> list[Path]:
    return sorted(path for path in tmp_path.glob("scratch/*/*") if path.is_dir())


def test_a_folder_is_copied_once_and_again_when_it_changed(data, tmp_path):
    (staged,) = localise([data / "latents.json"])
    assert tmp_path / "scratch" in staged.parents and staged.parts[-3:] == ("latents", "train", "latents.json")
    assert (staged.parent / "deep/plain_0.npy").read_bytes() == (data / "deep/plain_0.npy").read_bytes()
    before = (staged.parent / "deep/plain_0.npy").stat().st_ino
    assert localise([data]) == [staged.parent]
    assert (staged.parent / "deep/plain_0.npy").stat().st_ino == before
    (data / "latents.json").write_text('{"other": 1}')
    (other,) = localise([data / "latents.json"])
    assert other != staged and other.read_text() == '{"other": 1}'


def test_a_copy_that_was_cut_off_is_made_anew(data, tmp_path):
    (staged,) = localise([data])
    copies(tmp_path)[0].with_suffix(".json").unlink()  # written last
    (staged / "deep/plain_0.npy").write_bytes(b"half")
    assert localise([data]) == [staged]
    assert (staged / "deep/plain_0.npy").read_bytes() == (data / "deep/plain_0.npy").read_bytes()


def test_a_copy_that_differs_is_refused(data, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: Path(target).write_bytes(b"wrong"))
    with pytest.raises(UserError, match=r"is not what .*train/.* holds; look after that disk, or unset local_cache"):
        localise([data])


def test_processes_share_one_copy(data, tmp_path):
    code = "import sys; from pathlib import Path; from workflow_src.training.local_cache import localise; "
    code += "print(localise([Path(sys.argv[1])])[0])"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(data)], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=60) for process in started]
    assert {out for out, _ in said} == {f"{copies(tmp_path)[0]}/latents/train\n"}
    assert sum("copying train" in err for _, err in said) == 1


def test_copies_that_nobody_used_for_long_are_removed(data, tmp_path, capsys):
    localise([data])
    (staged,) = copies(tmp_path)
    old = time.time() - (local_cache.DAYS + 1) * 86400
    other = tmp_path / "other"
    shutil.copytree(data, other)
    os.utime(staged.with_name(f"{staged.name}.json"), (old, old))
    localise([other])
    assert staged.is_dir()  # this process reads it
    for handle in local_cache._in_use:  # as if it had ended
        handle.close()
    localise([other])
    assert not staged.exists() and len(copies(tmp_path)) == 1
    assert f"removing {staged}: not used for 7 days" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cache", "warning"),
    [
        ("$NOBODY_SET_THIS/x", r"$NOBODY_SET_THIS/x is not set on this machine"),
        ("/proc/nowhere", "No such file or directory"),
        ("", ""),
    ],
)
def test_without_a_usable_cache_the_data_are_read_where_they_lie(data, monkeypatch, capsys, cache, warning):
    monkeypatch.setenv(VARIABLE, cache)
    assert localise([data / "latents.json"]) == [data / "latents.json"]
    said = capsys.readouterr().err
    assert (warning in said and "reading from where the data lies" in said) if warning else not said


def test_a_disk_that_is_too_small_is_left_alone(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    assert localise([data]) == [data]
    assert "needs 0.0 GB" in capsys.readouterr().err and copies(tmp_path) == []
