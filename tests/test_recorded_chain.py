"""Registered data sets in the chain: named in the configuration, they are fetched, converted and trained on."""

from __future__ import annotations

import json
import re
import sys

import pytest
import yaml

from tests.chain import MINI, errors, run
from tests.loopback import serving
from tests.test_convert import SCHEMAS, make_source
from tests.test_datasets import REGISTRY
from workflow_src.common.errors import UserError
from workflow_src.episodes.registry import entry_dict
from workflow_src.episodes.store import EpisodeStore
from workflow_src.workflow import checked
from workflow_src.world_model.artefact import read_card


def configured(data, recorded=None) -> dict:
    """The miniature chain without its lab, trained on `data` for one step."""
    mapping = yaml.safe_load(MINI.read_text())
    mapping["lab"] = {"scene": "none", "tasks": [], "image_size": 32}
    mapping["policies"] = {}
    mapping["tokenizer"]["training"]["steps"] = mapping["world_model"]["training"]["steps"] = 1
    mapping["world_model"] |= {"data": data, "mirror": False, "own_frames": {"share": 0.0}}
    mapping["episodes"]["recorded"] = {"groups": 2} | (recorded or {})
    return mapping


def write(tmp_path, mapping):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def test_a_registered_name_is_enough(tmp_path):
    """A dry run of a mixture, without a path: every set is fetched, converted in groups and encoded."""
    config = write(tmp_path, configured("rt_1,bridge_v2,libero_10"))
    done = run(tmp_path / "run", "-n", "results/world_model/model.safetensors", "recorded_data", config=config)
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.M))
    assert jobs["download_dataset"] == "3" and jobs["convert_dataset"] == "6" and jobs["merge_dataset"] == "6"
    assert jobs["inspect_episodes"] == "6"
    assert jobs["cache_latents"] == "4"  # training splits of all three, and the primary one's own validation split
    for path in ("rt_1/validation", "bridge_v2/val", "libero_10/validation"):
        assert f"results/episodes/{path}/episodes.parquet" in done.stdout


def test_a_stream_leaves_no_copy():
    """Converted from the network, but for sets that list no shards."""
    flow = checked(configured("viola,bridge_sample", {"stream": True}))
    assert (flow.source("viola"), flow.source_file("viola")) == (REGISTRY["viola"].address, [])
    assert flow.source_file("bridge_sample") == "results/downloads/bridge_sample/download.json"


def test_one_set_can_be_asked_for():
    """`--config dataset=bridge_v2`, whatever the world model is trained on; `all` is the mixture."""
    flow = checked(configured("viola,rt_1") | {"dataset": "bridge_v2"})
    assert flow.asked == ["bridge_v2"] and list(flow.recorded) == ["viola", "rt_1", "bridge_v2"]
    assert flow.mixture.names == ("viola", "rt_1")
    assert checked(configured("viola,rt_1")).asked == ["viola", "rt_1"]
    with pytest.raises(UserError, match=r"dataset: 'bridge_v3' is unknown; did you mean 'bridge_v2'"):
        checked(configured("viola") | {"dataset": "bridge_v3"})


def test_nothing_to_fetch_is_one_line(tmp_path):
    """Neither without a registered set nor for one that is there: `episodes.stores` has it."""
    for split in ("train", "test"):
        (tmp_path / "viola" / split).mkdir(parents=True)
        (tmp_path / "viola" / split / "episodes.parquet").touch()
    mapping = configured("viola")
    mapping["episodes"]["stores"] = {"viola": str(tmp_path / "viola")}
    with pytest.raises(UserError, match=r"dataset: 'viola' is there already \(episodes\.stores\)"):
        checked(mapping | {"dataset": "viola"})
    done = run(tmp_path / "run", "-n", "recorded_data", config=write(tmp_path, mapping), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    (message,) = errors(done)
    assert message.startswith("error: world_model.data: names no registered data set besides those in episodes.stores")


def test_sets_are_fetched_or_copied_converted_and_trained_on(tmp_path):
    """One of one's own from the network, beside small copies of every schema that is registered; without a lab."""
    source = make_source(tmp_path / "source")
    copies = {name: str(make_source(tmp_path / "copies" / name, name, shards=1, each=3)) for name in SCHEMAS}
    pages = {f"/sets/mine/{path.name}": path.read_bytes() for path in source.iterdir()}
    model, page = "results/world_model/model.safetensors", "results/figures/episodes/mine/validation/contact_sheet.png"
    with serving(pages) as server:
        entry = entry_dict(REGISTRY["viola"]) | {"address": server.url.replace("/file.bin", "/sets/mine")}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mine": entry}))
        recorded = {"registry": str(tmp_path / "mine.yaml"), "copies": copies, "groups": 1}
        mapping = configured(",".join(["mine", *SCHEMAS]), recorded)
        mapping["world_model"]["latents"] = "on_the_fly"
        config = write(tmp_path, mapping)
        done = run(tmp_path / "run", model, page, config=config)
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stderr + done.stdout, re.M))
    # Training splits of all, and the validation split of the first.
    expected = ("1", str(1 + len(SCHEMAS)), str(2 + len(SCHEMAS)))
    assert (jobs["download_dataset"], jobs["convert_dataset"], jobs["merge_dataset"]) == expected
    stores = tmp_path / "run" / "results" / "episodes"
    assert (len(EpisodeStore(stores / "mine" / "train")), len(EpisodeStore(stores / "mine" / "test"))) == (6, 2)
    assert {len(EpisodeStore(stores / name / "train")) for name in SCHEMAS} == {3}
    assert json.loads((stores / "mine" / "train" / "provenance.json").read_text())["dataset"] == "mine"
    assert (tmp_path / "run" / page).with_name("alignment.csv").is_file()
    card = read_card(tmp_path / "run" / "results" / "world_model")
    assert [source.dataset for source in card.sources] == ["mine", *SCHEMAS]
    again = run(tmp_path / "run", "-n", model, page, config=config)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_store_that_is_there_is_not_made_again(tmp_path):
    (tmp_path / "viola" / "train").mkdir(parents=True)
    (tmp_path / "viola" / "test").mkdir()
    for split in ("train", "test"):
        (tmp_path / "viola" / split / "episodes.parquet").write_bytes(b"")
    mapping = configured("viola")
    mapping["episodes"]["stores"] = {"viola": str(tmp_path / "viola")}
    flow = checked(mapping)
    assert flow.recorded == {} and flow.store("viola", "validation") == str(tmp_path / "viola/test/episodes.parquet")


@pytest.mark.parametrize(
    ("data", "recorded", "message"),
    [
        ("violin", {}, r"world_model.data: 'violin' is unknown; did you mean 'viola'\?"),
        (
            "viola",
            {"copies": {"viola": "/nowhere"}},
            r"episodes.recorded.copies.viola: /nowhere: holds neither dataset_info",
        ),
        ("viola", {"copies": {"violin": "/"}}, r"episodes.recorded.copies: 'violin' is unknown"),
        ("viola", {"groups": 0}, r"episodes.recorded.groups: 0 is impossible"),
        ("viola", {"max_rejected": 1}, r"episodes.recorded.max_rejected: 1.0 is not a fraction"),
        ("viola", {"tensorflow": "tdfs"}, r"episodes.recorded.tensorflow: 'tdfs' is unknown; did you mean 'tfds'"),
        ("viola", {"tensorflow": "/none/python"}, r"episodes.recorded.tensorflow: '/none/python' is no Python"),
        ("viola", {"stream": True, "tensorflow": sys.executable}, r"episodes.recorded.stream: TensorFlow reads files"),
        ("viola", {"registry": "/none.yaml"}, r"/none.yaml: no such file of data sets"),
    ],
)
def test_mistakes_are_named_before_any_job(data, recorded, message):
    with pytest.raises(UserError, match=message):
        checked(configured(data, recorded))


def test_tensorflow_reads_in_an_environment_of_its_own():
    flow = checked(configured("viola"))
    assert (flow.reader_environment, flow.reader) == ("../envs/base.yaml", "python -m workflow_src.episodes.convert")
    flow = checked(configured("viola", {"tensorflow": "tfds"}))
    command = "python -m workflow_src.episodes.convert --reader tensorflow"
    assert (flow.reader_environment, flow.reader) == ("../envs/tfds.yaml", command)
    flow = checked(configured("viola", {"tensorflow": sys.executable}))
    assert (flow.reader_environment, flow.reader.split()[0]) == (None, sys.executable)


def test_only_robots_whose_axes_are_known_are_mirrored():
    mapping = configured("bridge_v2,viola")
    mapping["world_model"]["mirror"] = True
    with pytest.raises(UserError, match=r"world_model.mirror: how the robot of viola would move mirrored is not known"):
        checked(mapping)
    mapping["world_model"]["data"] = "bridge_v2"
    assert list(checked(mapping).recorded) == ["bridge_v2"]


def test_without_network_the_run_says_what_to_do(tmp_path):
    entry = entry_dict(REGISTRY["viola"]) | {"address": "http://127.0.0.1:9/x"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mine": entry}))
    config = write(tmp_path, configured("mine", {"registry": str(tmp_path / "mine.yaml")}))
    with serving({}) as server:  # a server without the set answers at once, a closed port after many tries
        entry["address"] = server.url.replace("/file.bin", "/sets/mine")
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mine": entry}))
        done = run(tmp_path / "run", "recorded_data", "--retries", "0", config=config, check=False)
    assert done.returncode
    (message, *_) = errors(done)
    assert (
        "mine (11.2 GB) cannot be fetched from http://127.0.0.1" in message
        and "episodes.recorded.copies.mine" in message
    )
