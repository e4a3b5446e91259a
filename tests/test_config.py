"""The configuration: defaults, one-line errors, schema, stage files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from workflow_src.common import config as configuration
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.workflow import ROOT, checked

CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
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
    assert checked(yaml.safe_load(path.read_text())).config.policies


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
        ("policies", {}, r"policies: is empty"),
        ("policies/x", {"network": "bc_q", "snapshot": 1}, r"policies\.x\.network: 'bc_q' is unknown; did you mean 'bc_"),
        ("policies/x", {"network": "bc_a", "snapshot": 7}, r"policies\.x\.snapshot: 7 is not a snapshot of 'bc_a'"),
        ("policies/x", {"adapter": "tabletop_rnadom"}, r"adapter: 'tabletop_rnadom' is unknown; did you mean 'tabletop_ra"),
        ("policies/x", {"adapter": "tabletop_random", "env": "tabltop"}, r"env: 'tabltop' is unknown; did you mean 'tabletop'"),
        ("policies/a b", {"adapter": "tabletop_random"}, r"policies\.a b: 'a b' is not usable as a file name"),
        ("policies/x", {"endpoint": "ws://127.0.0.1:1"}, r"policies\.x\.revision: is empty"),
        ("policies/x", {"endpoint": "ws://robot:1", "revision": "1"}, r"is unencrypted; use wss:// or set allow_plaintext"),
        ("policies/x", {"endpoint": "robot:1", "revision": "1"}, r"is not a websocket address"),
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
