"""The commands in the cloud: what is asked of Modal, and the container's entry point on a folder in place of its Volume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from cloud import entry, modal_app
from tests.chain import MINI, copy_of
from workflow_src.common.errors import UserError
from workflow_src.launch import MISTAKE
from workflow_src.workflow import checked

TRAIN = {"configfile": "mini.yaml", "subset_names": "tabletop", "batch_size": 4, "max_train_steps": 8, "validate_every": 3,
         "num_gpus": 0}  # fmt: skip


def test_what_is_asked_of_modal():
    for function, gpus in ((modal_app.on_gpus, [("A100-80GB", 4)]), (modal_app.on_processors, [])):
        asked = function.info()
        assert asked.gpus == gpus and asked.timeout == 24 * 3600 and asked.max_retries == 5
        assert [(path, volume.name) for path, volume in asked.volumes.items()] == [("/data", "rehearsal")]
        assert asked.secrets == ["modal.Secret.from_name('huggingface-secret')"]
    looking = modal_app.look.info()
    assert looking.gpus == [] and looking.secrets == [] and set(looking.volumes) == {"/data"}


def command(monkeypatch, name: str, **given):
    """What a command sends to Modal: the function's settings, and its arguments."""
    sent = []

    def remote(function, *arguments):
        sent.append((function.info(), arguments))
        return 0 if len(arguments) and arguments[0] in entry.COMMANDS else "text"

    monkeypatch.setattr(type(modal_app.on_gpus), "remote", remote)
    try:
        getattr(modal_app, name).info.raw_f(**given)
    except SystemExit as end:
        assert end.code == 0
    ((asked, arguments),) = sent
    return asked, *arguments


def test_commands_ask_for_their_gpus(monkeypatch):
    """By default as Wall-E-World's: four GPUs with 4 clips each, 100 000 steps, a checkpoint every 2000."""
    asked, name, options = command(monkeypatch, "train")
    assert asked.gpus == [("A100-80GB", 4)] and asked.timeout == 24 * 3600 and asked.max_retries == 5
    assert name == "train" and options == {
        "subset_names": "bridge", "batch_size": 4, "max_train_steps": 100_000, "validate_every": 2000, "num_gpus": 4,
        "configfile": "config/worldgym.yaml",
    }  # fmt: skip
    assert command(monkeypatch, "train", num_gpus=8, gpu="H100")[0].gpus == [("H100", 8)]
    assert command(monkeypatch, "train", num_gpus=0)[0].gpus == []
    for name in ("rollout", "rank"):
        asked, sent, options = command(monkeypatch, name)
        assert (asked.gpus, sent, options) == ([("A100-80GB", 1)], name, {"configfile": "bridge.yaml"})
    asked, name, options = command(monkeypatch, "download", dataset_name="all")
    assert (asked.gpus, name, options["dataset_name"]) == ([], "download", "all")
    assert command(monkeypatch, "status")[1:] == ("status", {"configfile": "bridge.yaml"})
    assert command(monkeypatch, "list_datasets")[1:] == ("list_datasets", {})


def test_a_run_on_a_registered_data_set(tmp_path):
    """The flags go into the run's configuration; data that is stored is not fetched again."""
    order = entry.train(tmp_path, "config/worldgym.yaml", "bridge", 4, 100_000, 2000, 4)
    assert order.arguments == ["results/bridge/world_model/model.safetensors", "--configfile", "bridge.yaml"]
    run = yaml.safe_load((tmp_path / "bridge.yaml").read_text())
    training = run["world_model"]["training"]
    assert (training["steps"], training["batch"], training["micro_batch"]) == (100_000, 16, 4)
    assert training["validate_every"] == training["checkpoint_every"] == 2000 and training["lr"] == 3e-5
    assert run["world_model"]["source"]["checkpoint"] == "" and run["gpus"]["world_model"] == 4
    assert run["episodes"]["stores"] == {} and run["results"] == "results/bridge"

    store = tmp_path / "data" / "episodes" / "bridge" / "train"
    store.mkdir(parents=True)
    (store / "episodes.parquet").touch()
    entry.train(tmp_path, "config/worldgym.yaml", "bridge,rt_1", 4, 100, 20, 1)
    run = yaml.safe_load((tmp_path / "bridge+rt_1.yaml").read_text())
    assert (
        run["episodes"]["stores"] == {"bridge": "data/episodes/bridge"} and run["world_model"]["data"] == "bridge,rt_1"
    )


def test_downloads_go_where_runs_look_for_them(tmp_path):
    order = entry.download(tmp_path, "config/worldgym.yaml", "bridge,rt_1")
    assert order.results == "data" and order.arguments[0] == "recorded_data"
    assert order.arguments[-2:] == ["results=data", 'world_model={"data": "bridge,rt_1"}']
    everything = entry.download(tmp_path, "config/worldgym.yaml", "all").arguments[-1]
    assert json.loads(everything.partition("=")[2])["data"].split(",")[:2] == ["rt_1", "bridge"]
    line = next(text for text in entry.list_datasets(tmp_path).splitlines() if text.startswith("bridge "))
    assert line.split() == ["bridge", "416.1", "CC", "BY", "4.0"]
    (tmp_path / "data" / "downloads" / "bridge").mkdir(parents=True)
    assert "unfinished" in entry.list_datasets(tmp_path)


def environment(folder: Path, name: str) -> Path:
    """An environment of the image, as far as anybody looks into it."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return python


def test_what_train_writes_is_rolled_out_with_the_policies_of_the_image(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(entry, "POLICIES", tmp_path / "policies")
    monkeypatch.chdir(tmp_path)  # as in the container
    pythons = {name: str(environment(entry.POLICIES, name)) for name in ("openvla", "octo")}
    entry.train(tmp_path, "config/worldgym.yaml", "bridge", 4, 100_000, 2000, 4)
    run = yaml.safe_load((tmp_path / "bridge.yaml").read_text())
    run["gpus"]["rollouts"] = {"openvla": 2, "rt_1_x": 2}
    (tmp_path / "bridge.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    capfd.readouterr()
    order = entry.rollout(tmp_path, "bridge.yaml")
    assert order.arguments == ["rollouts", "--configfile", "results/bridge/served.yaml"]
    (said,) = capfd.readouterr().err.splitlines()
    assert "left out" in said and "spatialvla (spatialvla), rt_1_x (rt1x); name their environments in REHEA" in said
    config = checked(yaml.safe_load((tmp_path / order.arguments[-1]).read_text())).config
    assert {name: policy.env for name, policy in config.policies.items()} == {
        "openvla": pythons["openvla"], "openvla_v01": pythons["openvla"],
        "octo_base": pythons["octo"], "octo_small": pythons["octo"],
    }  # fmt: skip
    assert config.gpus.rollouts == {"openvla": 2} and config.results == "results/bridge"


def test_policies_run_in_the_images_environments(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "POLICIES", tmp_path / "policies")
    policies = {
        "vla": {"adapter": "openvla", "env": "openvla"},
        "own": {"env": "/usr/bin/python3"},
        "running": {"env": "octo", "endpoint": "ws://127.0.0.1:1"},
        "bc": {"network": "bc"},
    }
    alone = {"policies": {"vla": policies["vla"]}}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    with pytest.raises(
        UserError, match=r"policies: the image has the environment of none: vla \(openvla\); name their"
    ):
        entry.rank(tmp_path, "alone.yaml")
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump({"results": "results/lab", "policies": policies}))
    python = environment(entry.POLICIES, "openvla")
    order = entry.rank(tmp_path, "lab.yaml")
    assert order.results == "results/lab" and order.arguments[0] == "results/lab/tables/policy_ranking.csv"
    served = yaml.safe_load((tmp_path / order.arguments[-1]).read_text())["policies"]
    assert served == policies | {"vla": policies["vla"] | {"env": str(python)}}


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("train", TRAIN | {"batch_size": 0}, "--batch-size: 0 is not 1 or more"),
        ("train", TRAIN | {"subset_names": "a,,b"}, "--subset-names: 'a,,b' names nothing or the same twice"),
        (
            "train",
            TRAIN | {"configfile": "absent.yaml"},
            "--configfile: 'absent.yaml' is neither stored (there: mini.yaml)",
        ),
        ("download", {"configfile": "mini.yaml", "dataset_name": "brige"}, "did you mean 'bridge'"),
    ],
)
def test_a_mistake_is_one_line_and_no_reason_for_another_attempt(tmp_path, capfd, name, given, line):
    shutil.copy(MINI, tmp_path)
    assert entry.run(name, given, tmp_path, lambda: pytest.fail("nothing to commit"), seconds=60) == MISTAKE
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("error: ") and line in said


class Storage:
    """A Volume: of a container that is lost, the next one sees what was committed. Takes the first away at a checkpoint."""

    def __init__(self, folder: Path):
        self.folder, self.kept, self.lost = folder, folder.with_name("committed"), False

    def commit(self) -> None:
        if not self.lost:
            shutil.rmtree(self.kept, ignore_errors=True)
            shutil.copytree(self.folder, self.kept)
            if entry.checkpoints(self.kept / "results" / "tabletop" / "state"):
                self.lost = True
                raise KeyboardInterrupt

    def reload(self) -> None:
        if self.lost:
            shutil.rmtree(self.folder)
            shutil.copytree(self.kept, self.folder)


@pytest.mark.filterwarnings("ignore:The .* function is executing locally")
def test_a_training_whose_container_is_lost_goes_on_from_what_was_committed(finished, tmp_path, monkeypatch):
    folder = tmp_path / "volume"
    results = folder / "results" / "tabletop"
    results.parent.mkdir(parents=True)
    copy_of(finished / "results", results)
    for name in ("world_model", "state"):
        shutil.rmtree(results / name)
    shutil.copy(MINI, folder)
    storage = Storage(folder)
    monkeypatch.setattr(entry, "POLL", 0.02)
    monkeypatch.setattr(modal_app, "FOLDER", str(folder))
    monkeypatch.setattr(modal_app, "volume", storage)

    with pytest.raises(KeyboardInterrupt):
        modal_app.on_processors.local("train", TRAIN)
    kept = storage.kept / "results" / "tabletop"
    newest = entry.checkpoints(kept / "state")[-1]
    record = json.loads(newest.read_text())
    record["history"][0]["loss"] = 123.0  # it shows that the next attempt begins with this very checkpoint
    newest.write_text(json.dumps(record))
    assert not (kept / "world_model" / "model.safetensors").exists()

    assert modal_app.on_processors.local("train", TRAIN) == 0
    made, expected = (load_file(path / "world_model" / "model.safetensors") for path in (results, finished / "results"))
    assert all((made[name] == expected[name]).all() for name in expected) and set(made) == set(expected)
    assert "123" in (results / "world_model" / "metrics.csv").read_text()
    seen = modal_app.look.local("status", {"configfile": "tabletop.yaml"})
    assert "checkpoint  world_model  step 8" in seen and "finished    world_model  step 8" in seen
    assert "log         logs/train_world_model.log" in seen
