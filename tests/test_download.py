"""Fetching a registered data set: from a server on loopback that cuts, changes and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.loopback import serving
from tests.test_convert import SIZE, content, make_source, run
from tests.test_datasets import REGISTRY
from workflow_src.common.errors import UserError
from workflow_src.episodes.convert import convert
from workflow_src.episodes.download import download
from workflow_src.episodes.merge import merge
from workflow_src.episodes.rlds import Rlds
from workflow_src.episodes.stream import Streamed


@pytest.fixture
def source(tmp_path) -> dict[str, bytes]:
    """A published set, by path on the server."""
    root = make_source(tmp_path / "source")
    return {f"/sets/viola/{path.name}": path.read_bytes() for path in root.iterdir()}


def entry_at(server):
    return dataclasses.replace(REGISTRY["viola"], address=server.url.replace("/file.bin", "/sets/viola"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".jsonl"}


def get(server, folder, **options):
    download("viola", entry_at(server), folder, **{"jobs": 1, "tries": 3, "pause": 0.01} | options)


def test_a_copy_is_complete_and_verified(tmp_path, source):
    with serving(source) as server:
        get(server, tmp_path / "viola", jobs=3)
        got = files(tmp_path / "viola")
        done = json.loads(got.pop("download.json"))
        assert {f"/sets/viola/{name}": data for name, data in got.items()} == source
        assert len(done["files"]) == 4 and done["licence"] == REGISTRY["viola"].licence
        server.seen.clear()
        get(server, tmp_path / "viola")
        assert server.seen == [], "what is there is not fetched again"
    assert (
        sum(len(list(Rlds(tmp_path / "viola").episodes(shard, []))) for shard in Rlds(tmp_path / "viola").shards()) == 8
    )


def test_an_interrupted_download_continues(tmp_path, source):
    with serving(source) as server:
        server.faults = [None, None, None, 3000, 404, 404, 404]  # cut within the second shard, then gone
        with pytest.raises(
            UserError, match=r"viola \(11.2 GB\) cannot be fetched from http://127.0.0.1:\d+/sets/viola:.*404"
        ):
            get(server, tmp_path / "viola")
        server.faults.clear()
        server.seen.clear()
        get(server, tmp_path / "viola")
        asked = [path for path, _ in server.seen if "tfrecord" in path]
        assert len(asked) == 3 and not any("-test." in path for path in asked), "what is whole is not fetched again"
    got = files(tmp_path / "viola")
    assert all(got[Path(path).name] == data for path, data in source.items())


def test_without_network_it_says_what_to_do(tmp_path):
    entry = dataclasses.replace(REGISTRY["viola"], address="http://127.0.0.1:9/sets/viola")
    with pytest.raises(UserError) as caught:
        download("viola", entry, tmp_path / "viola", tries=1)
    message = str(caught.value)
    for part in ("viola", "11.2 GB", "http://127.0.0.1:9/sets/viola", "episodes.recorded.copies.viola", str(tmp_path)):
        assert part in message
    with pytest.raises(UserError, match=r"viola.address: is empty"):
        download("viola", dataclasses.replace(entry, address=""), tmp_path / "viola")


class Flipping(dict):
    """Pages of a server; the first answer for `victim` is damaged in another way each of the first `times`."""

    victim, times = "/sets/viola/viola-train.tfrecord-00001-of-00003", 0

    def get(self, path):
        page = bytearray(self[path])
        if path == self.victim and self.times:
            page[200 + self.times] ^= 1
            self.times -= 1
        return bytes(page)


def test_what_is_damaged_on_the_way_is_fetched_again(tmp_path, source):
    with serving(Flipping(source)) as server:
        server.content.times = 1
        get(server, tmp_path / "viola")
        got = files(tmp_path / "viola")
        assert all(got[Path(path).name] == data for path, data in source.items())
        server.content.times = 2
        with pytest.raises(
            UserError, match="the record's checksum is wrong, and otherwise the first time; start again"
        ):
            get(server, tmp_path / "other")


def test_files_that_came_another_way_count(tmp_path, source):
    """A shard put into the folder by hand is verified and not fetched."""
    (tmp_path / "viola").mkdir()
    (tmp_path / "viola" / Path(Flipping.victim).name).write_bytes(source[Flipping.victim])
    with serving(source) as server:
        get(server, tmp_path / "viola")
        assert Flipping.victim not in [path for path, _ in server.seen]


def test_a_source_that_is_damaged_is_kept_and_said(tmp_path, source, capsys):
    data = bytearray(source[Flipping.victim])
    data[200] ^= 1
    with serving(source | {Flipping.victim: bytes(data)}) as server:
        get(server, tmp_path / "viola")
    assert "record 0: the record's checksum is wrong; its source is like that" in capsys.readouterr().err


def test_room_is_checked_first(tmp_path, source, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with serving(source) as server, pytest.raises(UserError, match=r"GB are needed and 0.0 GB free"):
        get(server, tmp_path / "viola")
    assert not list((tmp_path / "viola").glob("*tfrecord*"))


def test_what_is_streamed_converts_to_the_same_store(tmp_path, source):
    """From the network, cut within a shard and ended between two; of all shards, one is on the disk at a time."""
    run(tmp_path / "source", tmp_path / "whole", groups=1)
    out, folder = tmp_path / "viola" / "groups" / "1-of-1.json", tmp_path / "shards"

    def stream(address):
        convert("viola", REGISTRY["viola"], Streamed(address, folder, pause=0.01), (1, 1), SIZE, out)

    with serving(source) as server:
        address = server.url.replace("/file.bin", "/sets/viola")
        server.faults = [None, None, 3000, None, 404]  # the first shard is cut, the second one gone
        with pytest.raises(UserError, match="404"):
            stream(address)
        server.faults.clear()
        server.seen.clear()
        stream(address)
        assert sum("tfrecord" in path for path, _ in server.seen) == 3, "what is converted is not fetched again"
    assert len(list(folder.glob("*.tfrecord*"))) == 1
    for split in ("train", "test"):
        merge([out], split, 0.0, tmp_path / "viola" / split / "episodes.parquet")
    assert content(tmp_path / "viola") == content(tmp_path / "whole")
