"""WorldGym's folders of mp4 + npz: converted like any other set, fetched file by file, and named in the quick start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.loopback import serving
from tests.stores import write_worldgym
from workflow_src.common.errors import UserError
from workflow_src.common.files import sha256_file
from workflow_src.episodes.actions import metric_actions
from workflow_src.episodes.convert import convert
from workflow_src.episodes.download import download
from workflow_src.episodes.merge import merge
from workflow_src.episodes.registry import lookup
from workflow_src.episodes.sources import open_source
from workflow_src.episodes.store import EpisodeStore
from workflow_src.workflow import ROOT, checked

ENTRY = lookup("bridge_sample")
QUICK_START = ROOT / "config" / "quick_start.yaml"


@pytest.fixture
def folder(tmp_path) -> Path:
    write_worldgym(tmp_path / "sample" / "train", [6, 9, 4], seed=1)
    write_worldgym(tmp_path / "sample" / "test", [5], seed=2)
    return tmp_path / "sample"


def bring(source: Path, target: Path, tolerate: float = 0.0) -> dict[str, EpisodeStore]:
    out = target / "groups" / "1-of-1.json"
    convert("bridge_sample", ENTRY, open_source(source), (1, 1), 16, out)
    for split in ENTRY.splits:
        merge([out], split, tolerate, target / split / "episodes.parquet")
    return {split: EpisodeStore(target / split) for split in ENTRY.splits}


def test_a_converted_folder_is_what_the_folder_itself_is(tmp_path, folder):
    """The registry's scales and those by which such folders are read as they are agree; so do frames, numbers and lengths."""
    for split, store in bring(folder, tmp_path / "store").items():
        plain = EpisodeStore(folder / split)
        assert store.table["index"].tolist() == plain.table["index"].tolist()
        assert store.lengths.tolist() == plain.lengths.tolist()
        assert set(store.table["control_hz"]) == {5.0} and set(store.table["instruction"]) == {""}
        for i, count in enumerate(plain.lengths.tolist()):
            found = metric_actions(store, i, store.arrays(i), count)
            np.testing.assert_allclose(found, metric_actions(plain, i, plain.arrays(i), count), rtol=1e-5, atol=1e-7)
            errors = np.abs(store.frames(i)[:, None].astype(int) - plain.frames(i)[None]).mean((2, 3, 4))
            assert errors.argmin(1).tolist() == list(range(count))


def test_damage_is_listed(tmp_path, folder):
    (folder / "train" / "000000003.mp4").write_bytes(b"no video")
    np.savez(folder / "train" / "000000006.npz", np.zeros((3, 10), np.float32))
    stores = bring(folder, tmp_path / "store", tolerate=0.7)
    assert stores["train"].table["index"].tolist() == [0]
    reasons = pd.read_parquet(tmp_path / "store" / "train" / "rejected.parquet").set_index("index")["reason"]
    assert reasons[3].startswith("000000003: not a readable pair of mp4 and npz (")
    assert reasons[6] == "lengths differ: actions 3, video 4"


def test_files_are_fetched_and_must_be_the_registered_ones(tmp_path, folder):
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/*"))]
    with serving({f"/sample/{name}": (folder / name).read_bytes() for name in names}) as server:
        address = server.url.replace("/file.bin", "/sample")
        entry = dataclasses.replace(ENTRY, address=address, files={name: sha256_file(folder / name) for name in names})
        download("bridge_sample", entry, tmp_path / "here", tries=1)
        server.seen.clear()
        download("bridge_sample", entry, tmp_path / "here", tries=1)
        assert server.seen == [], "what is there is not fetched again"
        other = dataclasses.replace(entry, files=entry.files | {names[0]: "0" * 64})
        with pytest.raises(UserError, match=rf"bridge_sample \(0.0 GB\) cannot .*{names[0]}: sha256 is .*copies"):
            download("bridge_sample", other, tmp_path / "there", tries=1)
    assert all((tmp_path / "here" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    done = json.loads((tmp_path / "here" / "download.json").read_text())
    assert sorted(done["files"]) == names and not (tmp_path / "there" / "download.json").exists()
    assert len(ENTRY.files) == 2 * sum(ENTRY.splits.values()) == 20


def test_the_quick_start_fetches_or_takes_a_copy(folder):
    mapping = yaml.safe_load(QUICK_START.read_text())
    flow = checked(mapping)
    assert flow.source_file("bridge_sample") == f"{flow.results}/downloads/bridge_sample/download.json"
    mapping["episodes"]["recorded"]["copies"] = {"bridge_sample": str(folder)}
    flow = checked(mapping)
    assert flow.source_file("bridge_sample") == str(folder / "train" / "000000000.mp4")
    # Without a lab, the tokenizer sees what the world model is trained on.
    assert flow.seen_by_tokenizer("validation") == f"{flow.results}/episodes/bridge_sample/test/episodes.parquet"
