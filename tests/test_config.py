"""The configuration: defaults, one-line errors, schema, stage files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from workflow_src.common import config as configuration
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.workflow import ROOT, checked

CONFIGS = [path for path in sorted((ROOT / "config").glob("*.yaml")) if path.name != "datasets.yaml"]
DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


def with_(path: str, value):
    """The default configuration with one value replaced."""
    mapping = json.loads(json.dumps(DEFAULT))
    *parents, last = path.split("/")
    section = mapping
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return mapping


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert checked(yaml.safe_load(path.read_text())).config.trials


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sed", 1, r"sed: unknown key; did you mean 'seed'\?"),
        ("lab/horizn", 1, r"lab\.horizn: unknown key; did you mean 'horizon'\?"),
        ("lab/horizon", "long", r"lab\.horizon: 'long' is not a whole number"),
        ("lab/horizon", 0, r"lab\.horizon: 0 is impossible; it must be at least 1"),
        ("lab/horizon", 3, r"world_model\.clip_frames: \d+ is longer than an episode \(4 frames"),
        ("lab/tasks", ["lift", "push_lef"], r"lab\.tasks\[1\]: 'push_lef' is unknown; did you mean 'push_left'\?"),
        ("lab/tasks", [], r"lab\.tasks: \[\] is empty"),
        ("lab/image_size", 50, r"lab\.image_size: 50 is not a multiple of tokenizer\.downsample"),
        ("trials/per_task", 0, r"trials\.per_task: 0 is impossible"),
        ("analysis/real_trials", -1, r"analysis\.real_trials: -1 is impossible; 0 makes no such estimate"),
        ("episodes/splits/train/mix", {"expret": 1.0}, r"mix\.expret: 'expret' is unknown; did you mean 'expert'\?"),
        ("policies/x", {"network": "bc_q", "snapshot": 1}, r"policies\.x\.network: 'bc_q' is unknown; did you mean 'bc_"),
        ("policies/x", {"network": "bc_a", "snapshot": 7}, r"policies\.x\.snapshot: 7 is not a snapshot of 'bc_a'"),
        ("policies/x", {"adapter": "tabletop_rnadom"}, r"adapter: 'tabletop_rnadom' is unknown; did you mean 'tabletop_ra"),
        ("policies/x", {"adapter": "tabletop_random", "env": "tabltop"}, r"env: 'tabltop' is unknown; did you mean 'tabletop'"),
        ("policies/a b", {"adapter": "tabletop_random"}, r"policies\.a b: 'a b' is not usable as a file name"),
        ("policies/x", {"endpoint": "ws://127.0.0.1:1"}, r"policies\.x\.revision: is empty"),
        ("policies/x", {"endpoint": "ws://robot:1", "revision": "1"}, r"is unencrypted; use wss:// or set allow_plaintext"),
        ("policies/x", {"endpoint": "robot:1", "revision": "1"}, r"is not a websocket address"),
        ("policies/x", {"endpoint": "ws://127.0.0.1:1", "revision": "1", "foreign": {"state": "s"}}, r"cameras: is empty"),
        ("policies/x", {"endpoint": "ws://127.0.0.1:1", "revision": "1", "foreign": {"cameras": ["c"], "layout": ["z", "q"]}},
         r"policies\.x\.foreign\.layout\[1\]: 'q' is unknown"),
        ("policies/x", {"adapter": "tabletop_random", "foreign": {"cameras": ["c"]}}, r"for a server that is already running"),
        ("policies/x", {"adapter": "lerobot", "foreign": {"state": "observation.state", "state_layout": ["x", "q"]}},
         r"policies\.x\.foreign\.state_layout\[1\]: 'q' is unknown"),
        ("judges/primary", "clasifier", r"judges\.primary: 'clasifier' is unknown; did you mean 'classifier'"),
        ("judges/primary", "human", r"judges\.primary: 'human' is unknown"),
        ("judges/vlm", {"state": {"model": "m"}}, r"judges\.vlm\.state: is the name of another judge"),
        ("judges/vlm", {"a b": {"model": "m"}}, r"judges\.vlm\.a b: 'a b' is not usable as a file name"),
        ("judges/vlm/gpt", {"model": ""}, r"judges\.vlm\.gpt\.model: is empty"),
        ("judges/vlm/gpt", {"model": "m", "base_url": "host:1"}, r"gpt\.base_url: 'host:1' is not an address"),
        ("judges/vlm/gpt", {"model": "m", "base_url": "http://h/v1"}, r"base_url: 'http://h/v1' is unencrypted"),
        ("judges/vlm/gpt", {"model": "m", "base_url": "https://u:sk-1@h/v1"}, r"base_url: holds a name or password; put"),
        ("judges/vlm/gpt", {"model": "m", "prompt": "x"}, r"gpt\.prompt: 'x' is not among config/prompts: success_1"),
        ("judges/vlm/gpt", {"model": "m", "votes": 0}, r"gpt\.votes: 0 is impossible; it must be at least 1"),
        ("judges/vlm/gpt", {"model": "m", "worlds": []}, r"gpt\.worlds: is empty"),
        ("judges/vlm/gpt", {"model": "m", "spend_limit": 5}, r"gpt\.spend_limit: needs price_input and price_output"),
        ("judges", {"primary": "gpt", "vlm": {"gpt": {"model": "m", "worlds": ["lab"]}}}, r"gpt\.worlds: lacks world_model"),
        ("judges/human", {"labels": ["no.csv"]}, r"judges\.human\.labels\[0\]: 'no\.csv' is not a file"),
        ("judges/human", {"sample": "no.csv"}, r"judges\.human\.sample: 'no\.csv' is not a file"),
        ("judges/probes", 0, r"judges\.probes: 0 is impossible"),
        ("reality", "nowhere.csv", r"reality: 'nowhere\.csv' is not a file"),
        ("world_model/own_frames/share", 1.5, r"own_frames\.share: 1\.5 is not a fraction"),
        ("world_model/own_frames/every", 0, r"own_frames\.every: 0 is impossible"),
        ("world_model/own_frames/horizon", 2, r"own_frames\.horizon: 2 does not fit; from 4 .* to 18"),
        ("world_model/sampler/window", 9, r"sampler: horizon 1 and window 9 do not fit; 1 <= horizon < window <= 5"),
        ("world_model/objective/schedule", "sigmoid", r"own_frames\.share: needs world_model\.objective\.schedule flow"),
        ("world_model/network/attention", "joined", r"attention: 'joined' is not allowed; did you mean 'joint'"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(path, value, message):
    with pytest.raises(UserError, match=message) as error:
        checked(with_(path, value))
    assert "\n" not in str(error.value)


def test_a_policy_runs_in_a_named_environment_or_under_a_named_interpreter(tmp_path):
    flow = checked(with_("policies/x", {"adapter": "openvla", "env": "openvla"}))
    assert (flow.environment("x"), flow.interpreter("x")) == ("../envs/openvla.yaml", "python")
    flow = checked(with_("policies/x", {"adapter": "lerobot", "env": sys.executable}))
    assert (flow.environment("x"), flow.interpreter("x")) == (None, sys.executable)
    flow = checked(with_("policies/x", {"adapter": "lerobot", "env": sys.prefix}))
    assert (flow.environment("x"), flow.interpreter("x")) == (None, f"{sys.prefix}/bin/python")
    flow = checked(with_("policies/x", {"adapter": "lerobot", "env": "conda:mine"}))
    assert (flow.environment("x"), flow.interpreter("x")) == ("mine", "python")
    with pytest.raises(
        UserError, match=r"policies\.x\.env: '/no/python' is no Python interpreter here; see envs/build\.py"
    ):
        checked(with_("policies/x", {"adapter": "lerobot", "env": "/no/python"}))
    with pytest.raises(UserError, match=r"policies\.x\.env: 'openvla2' is unknown; did you mean 'openvla'"):
        checked(with_("policies/x", {"adapter": "openvla", "env": "openvla2"}))


def test_the_doctor_is_told_how_to_reach_a_running_server():
    endpoint = {"endpoint": "ws://lab:80", "revision": "r", "token_env": "TOKEN", "allow_plaintext": True}
    flow = checked(with_("policies/x", endpoint))
    assert flow.endpoint_arguments("x") == "--allow-plaintext --endpoint ws://lab:80 --token-env TOKEN "
    assert checked(with_("policies/x", {"adapter": "openvla", "env": "openvla"})).endpoint_arguments("x") == ""


def test_without_a_lab_trials_say_which_tasks_there_are(tmp_path):
    for task in ("put_carrot", "close_drawer"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "0.json").touch()
    mapping = with_("lab", {"scene": "none", "tasks": [], "image_size": 256, "horizon": 18}) | {
        "trials": {"root": str(tmp_path)}
    }
    flow = checked(mapping)
    assert flow.config.lab.tasks == ("close_drawer", "put_carrot") and flow.worlds == ("world_model",)
    assert flow.per_rollout("{world}/{policy}/{shard}")[0].startswith("world_model/")
    with pytest.raises(UserError, match=r"trials\.root: is empty; without a lab"):
        checked(mapping | {"trials": {}})


@pytest.fixture
def stores(tmp_path):
    """Folders of three data sets: ours, WorldGym's, and one without a validation split."""
    for path in ("ours/train", "ours/val", "published/train", "published/test", "alone/train"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / ("episodes.parquet" if path.startswith("ours") else "000000000.mp4")).touch()
    return {name: str(tmp_path / name) for name in ("ours", "published", "alone")}


def with_data(stores, data, **world_model):
    mapping = with_("episodes/stores", stores)
    own_frames = {"share": 0.0}
    mapping["world_model"] |= {"data": data, "own_frames": own_frames} | world_model
    return mapping


def test_a_mixture_finds_the_splits_of_its_data_sets(stores):
    flow = checked(with_data(stores, "published,tabletop,alone"))
    assert flow.mixture.names == ("published", "tabletop", "alone")
    assert flow.store("published", "validation") == f"{stores['published']}/test"
    assert flow.store("ours", "train") == f"{stores['ours']}/train/episodes.parquet"
    assert flow.store("ours", "validation") == f"{stores['ours']}/val/episodes.parquet"
    assert flow.store("tabletop", "train") == "results/episodes/tabletop/train/episodes.parquet"
    assert flow.caches("train", ["ours"]) == ["results/latents/ours/train/latents.json"]
    assert checked(with_data(stores, "ours", latents="on_the_fly")).caches("train", ["ours"]) == []
    assert checked(with_data(stores, {"ours": 1, "published": 2})).mixture.names == ("published", "ours")


def test_another_data_set_records_and_encodes_nothing_anew(stores, tmp_path):
    def stages(mapping):
        checked(mapping | {"results": str(tmp_path)}).write_stage_files()
        return {f.name: f.read_text() for f in Path(tmp_path, "config").glob("*.json")}

    before, after = stages(with_data({}, "")), stages(with_data(stores, "tabletop,ours"))
    assert {name for name in before if before[name] != after[name]} == {"world_model.json"}
    assert json.loads(before["world_model.json"])["world_model"]["data"] == "tabletop"


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("our", {}, r"world_model\.data: 'our' is unknown; did you mean 'ours'\?"),
        ("ours,ours", {}, r"world_model\.data: 'ours,ours' names nothing or the same twice"),
        ({"ours": -1}, {}, r"world_model\.data\.ours: weight -1\.0 is not positive"),
        ({"ours": "much"}, {}, r"world_model\.data\.ours: 'much' is not a number"),
        (["ours"], {}, r"world_model\.data: \['ours'\] is not text"),
        ("alone", {}, r"episodes\.stores\.alone: .* holds no episodes of the split validation; .* validation or val or test/"),
        ("ours", {"frame_skip": {"tabletop": 2}}, r"world_model\.frame_skip: 'tabletop' is unknown"),
        ("ours", {"frame_skip": 0}, r"world_model\.frame_skip: 0 for ours is impossible"),
        ("tabletop", {"frame_skip": 5}, r"clip_frames: 5 is longer than an episode \(19 frames .*, every 5\. shown\)"),
        ("ours", {"own_frames": {"share": 0.5}}, r"own_frames\.share: 0\.5 needs the lab's data set alone"),
        ("tabletop", {"own_frames": {"share": 0.5}, "latents": "on_the_fly"}, r"with world_model\.latents: cached"),
    ],
)  # fmt: skip
def test_a_mistake_about_data_gets_one_line(stores, data, changes, message):
    with pytest.raises(UserError, match=message) as error:
        checked(with_data(stores, data, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("tabletop", "ours", r"episodes\.stores\.tabletop: is what the lab's data set is called"),
        ("a/b", "ours", r"episodes\.stores\.a/b: 'a/b' is not usable as a file name"),
        ("mine", "nowhere", r"episodes\.stores\.mine: '.*nowhere' holds no episodes of the split train"),
    ],
)
def test_wrong_stores_are_named(stores, tmp_path, name, path, message):
    with pytest.raises(UserError, match=message):
        checked(with_data({name: str(tmp_path / path)}, ""))


def test_schema_file_is_in_step_with_the_model():
    assert configuration.SCHEMA.read_text() == configuration.schema_text(), (
        "run: python -m workflow_src.common.config schema"
    )


def test_stage_files_hold_only_what_the_stage_depends_on(tmp_path):
    def stages(mapping):
        workflow = checked(mapping | {"results": str(tmp_path)})
        workflow.write_stage_files()
        return {str(f.relative_to(tmp_path)): f.stat().st_mtime_ns for f in Path(tmp_path, "config").rglob("*.json")}

    before = stages(DEFAULT)
    after = stages(with_("policies/random", {"adapter": "tabletop_random", "options": {"scale": 0.5}}))
    assert {name for name in before if before[name] != after[name]} == {
        "config/policies/random.json", "config/analysis.json",
    }  # fmt: skip


def test_a_judge_reruns_for_nobody_elses_sake(tmp_path):
    def files(judges):
        mapping = with_("judges", judges) | {"results": str(tmp_path)}
        workflow = checked(mapping)
        workflow.write_stage_files()
        return workflow, {f.relative_to(tmp_path): f.read_text() for f in Path(tmp_path, "config").rglob("*.json")}

    _, plain = files({})
    one, first = files({"vlm": {"gpt": {"model": "m"}}, "primary": "gpt"})
    _, second = files({"vlm": {"gpt": {"model": "m"}, "qwen": {"model": "q"}}, "primary": "qwen"})
    assert {str(name) for name in first if plain.get(name) != first[name]} == {
        "config/judges/gpt.json",
        "config/analysis.json",
    }
    changed = {str(name) for name in second if first.get(name) != second[name]}
    assert changed == {"config/judges/qwen.json", "config/analysis.json"}
    assert one.judgements() == [f"{tmp_path}/judgements/{name}.parquet" for name in ("learned", "gpt")]


def test_speed_knobs_rerun_nothing(tmp_path):
    files = []
    for workers in (1, 2):
        mapping = with_("lab/workers", workers) | {"results": str(tmp_path)}
        mapping["rollouts"] = {"batch": 51, "shards": workers}
        checked(mapping).write_stage_files()
        files.append({f: f.read_text() for f in Path(tmp_path, "config").rglob("*.json") if f.name != "analysis.json"})
    assert files[0] == files[1]


def test_a_stage_knows_its_sections(tmp_path):
    path = configuration.write_stage(tmp_path, "x", Config(), {"lab": None})
    stage = configuration.load_stage(path)
    assert stage.lab.horizon == Config().lab.horizon
    with pytest.raises(UserError, match="has no section 'judges'"):
        _ = stage.judges
