"""TensorFlow's `as_dataset` as the reader of RLDS: the same stores as ours, byte by byte."""

from __future__ import annotations

import json
import subprocess

import pytest

from envs.build import interpreter
from tests.test_convert import SIZE, content, make_source
from workflow_src.common.errors import UserError
from workflow_src.episodes.convert import convert
from workflow_src.episodes.registry import lookup
from workflow_src.episodes.rlds import Rlds
from workflow_src.episodes.sources import open_source
from workflow_src.workflow import ROOT

NAMES = ("rt_1", "bridge_v2", "taco_play", "toto")  # bases, flat actions, several texts, booleans


def ours(name, source, folder):
    out = folder / "groups" / "1-of-1.json"
    convert(name, lookup(name), Rlds(source), (1, 1), SIZE, out)
    return json.loads(out.read_text())


@pytest.mark.requires("tensorflow")
def test_both_readers_make_the_same_stores(tmp_path):
    """Of directories in four schemas, and of one that TFDS itself wrote. Damage costs TensorFlow the rest of a shard."""
    sources = {name: make_source(tmp_path / "sources" / name, name, shards=2) for name in NAMES}
    damaged = sources["roboturk"] = make_source(tmp_path / "sources" / "roboturk", "roboturk", shards=1, each=3)
    shard = damaged / "roboturk-train.tfrecord-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[int.from_bytes(data[:8], "little") + 66] ^= 1  # within the second record
    shard.write_bytes(data)
    words = [interpreter("tfds"), ROOT / "tests" / "tensorflow_side.py", tmp_path]
    done = subprocess.run(
        [*words, *(f"{name}={source}" for name, source in sources.items())],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, source in (sources | {"viola": tmp_path / "written"}).items():
        found = ours(name, source, tmp_path / "ours" / name)
        other = json.loads((tmp_path / "tensorflow" / name / "groups" / "1-of-1.json").read_text())
        if name == "roboturk":
            assert [row["record"] for row in found["rejected"]] == [1]
            assert [row["record"] for row in other["rejected"]] == [1, 2]
            assert other["rejected"][0]["reason"].startswith("TensorFlow reads no further (DataLossError")
            continue
        assert len(found["episodes"]) == (7 if name == "viola" else 2 * (2 + (len(lookup(name).splits) > 1)))
        assert other == found and found["rejected"] == []
        assert content(tmp_path / "tensorflow" / name) == content(tmp_path / "ours" / name)


def test_without_tensorflow_it_says_where_there_is_one(tmp_path):
    source = make_source(tmp_path / "source", shards=1, each=1)
    with pytest.raises(UserError, match=r"--reader tensorflow: No module named 'tensorflow'; .*envs/tfds.yaml"):
        open_source(source, tensorflow=True)
    with pytest.raises(
        UserError, match=r"--reader: tensorflow reads files, not http://127.0.0.1:9/x; fetch them first"
    ):
        open_source("http://127.0.0.1:9/x", tmp_path, tensorflow=True)
