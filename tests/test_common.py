"""Files, journals, seeds, video, processes: what every stage stands on."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import Journal, atomic_path, digest, sha256_file, write_if_changed, write_text
from workflow_src.common.process import alive
from workflow_src.common.seeds import derive, rng
from workflow_src.common.video import read_video, write_gif, write_video


def test_atomic_path_leaves_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_write_if_changed_keeps_the_time_stamp(tmp_path):
    target = tmp_path / "a.txt"
    assert write_if_changed(target, "x")
    os.utime(target, (1, 1))
    assert not write_if_changed(target, "x")
    assert target.stat().st_mtime == 1
    assert write_if_changed(target, "y")


def test_digest_ignores_key_order_and_sees_values():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_sha256_of_a_known_content(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_journal_survives_a_cut_off_line_and_forgets_under_another_key(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "k1")
    journal.record("a", sha="1")
    journal.record("b", sha="2")
    path.write_text(path.read_text() + '{"item": "c", "sh')  # a crash while writing
    again = Journal(path, "k1")
    assert set(again.done) == {"a", "b"}
    again.record("c", sha="3")
    assert Journal(path, "k1").done["c"] == {"sha": "3"}
    assert Journal(path, "k2").done == {}


def test_seeds_are_fixed_numbers_and_differ_by_name():
    # Golden: a change here changes every result of every user.
    assert derive(0, "world_model") == derive(0, "world_model")
    assert derive(0, "a", 1) != derive(0, "a", "1") != derive(1, "a", "1")
    assert rng(7, "x").integers(1 << 30) == rng(7, "x").integers(1 << 30)


def test_lossless_video_returns_the_very_pixels(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=5)
    write_video(tmp_path / "b.mp4", frames, fps=5)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4"), frames)
    assert sha256_file(tmp_path / "a.mp4") == sha256_file(tmp_path / "b.mp4")


def test_a_damaged_video_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((5, 24, 32, 3), np.uint8), fps=5)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"a\.mp4: not a readable video"):
        read_video(path)


def test_gif_is_enlarged(tmp_path):
    from PIL import Image

    write_gif(tmp_path / "a.gif", np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), 5, scale=4)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.size == (32, 32)
        assert image.n_frames == 3


def test_a_line_is_written_in_one_piece_whatever_the_buffering():
    """Into a socket of messages, where every write arrives by itself: lines of jobs that share a pipe stay whole."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    script = """
        from workflow_src.common.errors import UserError, run_cli
        from workflow_src.common.progress import Progress

        with Progress(2, "count", every=0) as progress:
            progress.update()
        def main(): raise UserError("a: b")
        run_cli(main)
    """
    subprocess.run([sys.executable, "-u", "-c", textwrap.dedent(script)], stderr=theirs)
    theirs.close()
    ours.settimeout(1)
    messages = [ours.recv(4096).decode() for _ in range(3)]
    ours.close()
    assert [message[:5] for message in messages] == ["count", "count", "error"]
    assert all(message.endswith("\n") and message.count("\n") == 1 for message in messages)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("x.yaml: bad"), 2, "error: x.yaml: bad\n"),
        (OSError(errno.ENOSPC, "full", "/data/x"), 2, "no space left on the device that holds /data/x"),
    ],
)
def test_run_cli_prints_one_line(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_cli(main)
    printed = capsys.readouterr().err
    assert exit_.value.code == code
    assert words in printed
    assert printed.count("\n") == 1


def _wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("through_shell", [False, True])
def test_a_job_ends_when_its_run_is_killed(tmp_path, through_shell):
    """Also with a shell in between, which survives its parent's `kill -9`."""
    job = tmp_path / "job.py"
    job.write_text(
        textwrap.dedent("""
        import os, sys, time
        from workflow_src.common.process import die_with_parent
        die_with_parent(poll=0.1)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(60)
        """)
    )
    pid_file = tmp_path / "pid"
    command = f"{sys.executable} {job} {pid_file}"
    if through_shell:
        command = f"export REHEARSAL_PARENT=$PPID; {command} 2>&1 | cat"
    else:
        command = f"exec {command}"
    code = "import subprocess, sys; subprocess.run(['bash', '-c', sys.argv[1]])"
    runner = subprocess.Popen([sys.executable, "-c", code, command])
    assert _wait_until(lambda: pid_file.is_file() and pid_file.read_text())
    pid = int(pid_file.read_text())
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    if not through_shell:
        # `exec` made the job the runner's own child.
        assert _wait_until(lambda: not alive(pid))
    else:
        assert _wait_until(lambda: not alive(pid))
