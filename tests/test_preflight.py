"""The preflight: Snakemake's reasons, costs, what is missing, and that no trained model is thrown away. Dry runs only."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.chain import MINI, ROOT
from workflow_src.common.config import from_dict
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.execution import preflight_command
from workflow_src.launch import only_run
from workflow_src.preflight import costs, needs
from workflow_src.preflight.__main__ import preflight
from workflow_src.preflight.dry_run import Job, _complaint, in_order, parse
from workflow_src.preflight.report import Preflight, stages

GOLDEN = ROOT / "tests" / "golden" / "preflight.txt"
DRY_RUN = """\
Building DAG of jobs...
[Sat Nov 21 17:53:53 2026]
rule train_judge:
    input: config/judges.json, judge/episodes.parquet
    output: judge/model.safetensors
    benchmark: benchmarks/train_judge.jsonl
    reason: Input files updated by another job: judge/episodes.parquet; Params have changed since last execution:
        before: <nothing exclusive>
        now: 'a: b'
    threads: 2
    resources: tmpdir=/tmp, gpu=4, mem_mb=8000
[Sat Nov 21 17:53:53 2026] Group job 487eb8a6 (jobs in lexicogr. order):

    [Sat Nov 21 17:53:53 2026]
    rule roll_out:
        input: endpoints/p/0.json
        output: lab/p/rollouts.parquet, world_model/p/rollouts.parquet
        reason: Missing output files: lab/p/rollouts.parquet
        wildcards: policy=p, shard=0
        resources: tmpdir=/tmp, gpu=0
    [Sat Nov 21 17:53:53 2026]
    rule serve_policy:
        output: endpoints/p/0.json (service)
        wildcards: policy=p, shard=0
        threads: 0
        resources: tmpdir=/tmp, gpu=2
[Sat Nov 21 17:53:53 2026]
localrule record:
    output: judge/episodes.parquet
    reason: Code has changed since last execution
[Sat Nov 21 17:53:53 2026]
rule all:
    input: judge/model.safetensors
    jobid: 0
Job stats:
"""


def look(folder: Path, monkeypatch, configfile: Path = MINI, **options) -> Preflight:
    """A preflight in `folder`, of a machine without GPUs and with 50 GB of free disk."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50e9))
    chosen = {
        "target": [], "configfile": configfile, "config": [], "cores": 2, "profile": "", "sdm": [],
        "allow_retraining": False,
    } | options  # fmt: skip
    return preflight(argparse.Namespace(**chosen))


# ---- Snakemake's own words ------------------------------------------------------------------------------------------


def test_jobs_are_read_from_a_dry_run():
    judge, rolled, server, record = jobs = parse(DRY_RUN)
    assert [job.rule for job in jobs] == ["train_judge", "roll_out", "serve_policy", "record"]
    assert (judge.threads, judge.gpus, judge.benchmark) == (2, 4, "benchmarks/train_judge.jsonl")
    # What follows from another job says least, so it comes last.
    assert judge.causes == ["Params have changed since last execution", "Input files updated by another job"]
    assert judge.reason.endswith("before: <nothing exclusive> now: 'a: b'")
    assert server.service and server.output == ("endpoints/p/0.json",) and server.threads == 0
    # The server's GPUs are in use as long as the rollouts last.
    assert (rolled.gpus, server.gpus, rolled.wildcards) == (2, 0, {"policy": "p", "shard": "0"})
    assert record.causes == ["Code has changed since last execution"]
    assert [job.rule for job in in_order(jobs)] == ["record", "serve_policy", "roll_out", "train_judge"]


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "Config file x\nerror: seeed: unknown key; did you mean 'seed'?\n",
            "seeed: unknown key; did you mean 'seed'?",
        ),
        (
            "MissingInputException in rule a in file b:\nMissing input files for rule a:\n    output: c\n"
            "    affected files:\n        d.parquet\n        e.parquet\n",
            "rule a: no rule makes its input d.parquet, e.parquet; put it there or change the configuration",
        ),
        (
            "Building\nMissingRuleException:\nNo rule to produce x\n",
            "Snakemake: MissingRuleException: No rule to produce x",
        ),
    ],
)
def test_what_snakemake_complains_of_is_one_line(said, line):
    assert _complaint(said) == line


# ---- whole preflights -----------------------------------------------------------------------------------------------


def test_the_miniature_chain_on_one_screen(tmp_path, monkeypatch):
    """If a change is meant, write the text this test prints into tests/golden/preflight.txt."""
    found = look(tmp_path, monkeypatch)
    assert found.text() + "\n" == GOLDEN.read_text(), found.text()
    assert found.code == 0 and found.as_json()["exit_code"] == 0 and json.dumps(found.as_json())
    assert list(Path("results").rglob("*.parquet")) == [], "a preflight makes nothing"


def test_the_estimate_of_the_default_run_is_near_what_it_took(tmp_path, monkeypatch):
    """19 minutes on two cores (benchmarks/tabletop.md)."""
    found = look(tmp_path, monkeypatch, ROOT / "config" / "config.yaml")
    assert found.code == 0 and 19 * 60 / 2 < found.wall < 19 * 60 * 2
    assert all(stage.seconds is not None for stage in found.stages)


def test_everything_that_is_missing_is_named_at_once(tmp_path, monkeypatch):
    """A broken configuration: no key, no weights, no conda, suites without first frames."""
    for file in ("lift/a.json", "push_left/b.png", "pour/c.txt"):
        (tmp_path / "frames" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "frames" / file).touch()
    config = yaml.safe_load(MINI.read_text())
    config["trials"] = {"root": "frames", "suites": ["bridge_17"]}
    config["judges"]["vlm"] = {"gpt": {"model": "m", "key_env": "ABSENT_KEY", "price_input": 1, "price_output": 1}}
    config["policies"]["act"] = {"adapter": "lerobot", "env": "lerobot", "checkpoint": "downloads/act/model"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    found = look(tmp_path, monkeypatch, tmp_path / "config.yaml")
    assert found.code == 1
    assert [need.text for need in found.needs if not need.there] == [
        "policies.act.checkpoint: downloads/act/model is not there",
        "judges.vlm.gpt.key_env: environment variable ABSENT_KEY is not set; export the key for "
        "https://api.openai.com/v1, or name another variable",
        "environment lerobot (policies.act.env): is used only with --use-conda; add it, or name a Python interpreter instead",
        "trials.root: frames: no pictures for lift, which a .json there describes",
    ]
    said = found.text()
    assert "ok       trials.suites: bridge_17: no first frames for " in said
    assert "time not known: ask_vlm, calibrate_vlm" in said and "at least " in said and "API cost" in said
    assert said.endswith("not ready: 4 thing(s) missing")


# ---- single questions -----------------------------------------------------------------------------------------------


def test_a_trained_model_is_not_thrown_away(tmp_path):
    (tmp_path / "judge").mkdir()
    assert needs.retrained(parse(DRY_RUN), tmp_path) == []  # a first or interrupted training
    (tmp_path / "judge" / "model.safetensors").touch()
    (again,) = needs.retrained(parse(DRY_RUN), tmp_path)
    row = costs.Cost(1.0)
    asked = Preflight("all", 2, stages([again], [row]), 1.0, 0, [needs.Need(True, "disk")], [again], False)
    assert asked.code == 3 and "REFUSED  judge/model.safetensors would be trained anew: Input files" in asked.text()
    allowed = Preflight("all", 2, asked.stages, 1.0, 0, asked.needs, [again], True)
    assert allowed.code == 0 and "again    judge/model.safetensors" in allowed.text()


def test_jobs_are_laid_side_by_side():
    first = Job("a", output=("1",), threads=2)
    middle = [Job("b", input=("1",), output=(name,), gpus=1) for name in ("2", "3", "4")]
    last = Job("c", input=("2", "3", "4"), output=("5",))
    jobs, seconds = [first, *middle, last], [10.0, 4.0, 6.0, 8.0, 1.0]
    assert costs.wall_seconds(jobs, seconds, 2, 3) == 10 + (6 + 4) + 1
    assert costs.wall_seconds(jobs, seconds, 8, 1) == 10 + 18 + 1
    assert costs.wall_seconds(jobs, seconds, None, 3) == 10 + 8 + 1
    assert costs.wall_seconds(jobs, seconds, 1, 0) == 10 + 18 + 1


def test_runs_of_this_folder_teach_the_estimates(tmp_path, monkeypatch):
    """A job that took twice as long as the table says: the next one of its rule is expected to, whatever its size."""
    monkeypatch.chdir(tmp_path)
    config = from_dict(Config, yaml.safe_load(MINI.read_text()))
    before = costs.Estimator(config, 2).cost(Job("train_judge")).seconds
    noted = SimpleNamespace(
        rule=SimpleNamespace(name="train_judge"), wildcards={}, resources={"gpu": 0}, benchmark="b.jsonl"
    )
    costs.note_work(config, [noted, SimpleNamespace(benchmark=None)])
    Path("b.jsonl").write_text(json.dumps({"s": 2 * before}))
    assert costs.Estimator(config, 2).cost(Job("train_judge")).seconds == pytest.approx(2 * before)
    assert costs.Estimator(config, 2).cost(Job("train_judge", gpus=1)).seconds == before  # a GPU is another machine


def test_trials_are_counted_where_they_come_from(tmp_path, monkeypatch):
    """Pictures that a suite describes count without a json beside them; a public list says only later how many it has."""
    monkeypatch.chdir(tmp_path)
    for name in ("lift/a.png", "lift/b.jpg", "lift/a.json", "push/a.png"):
        Path("frames", name).parent.mkdir(parents=True, exist_ok=True)
        Path("frames", name).touch()
    lifts = {"tasks": {"lift": {"instruction": "lift it"}, "push": {"instruction": "push it"}}}
    own, listed = str(tmp_path / "own.yaml"), str(tmp_path / "listed.yaml")
    Path(own).write_text(yaml.safe_dump(lifts))
    Path(listed).write_text(yaml.safe_dump({"tasks": {"pour": {"list": "https://example.org/frames"}}}))
    settings = {
        "lab": {"scene": "none"}, "rollouts": {"repeats": 2}, "policies": {"p": {}},
        "judges": {"vlm": {"gpt": {"model": "m", "price_input": 1.0, "price_output": 1.0, "worlds": ["world_model"]}}},
    }  # fmt: skip

    def estimates(suites: list[str]) -> tuple[float, costs.Cost, costs.Cost]:
        config = from_dict(Config, settings | {"trials": {"root": str(tmp_path / "frames"), "suites": suites}})
        config = replace(config, lab=replace(config.lab, tasks=()))
        estimator = costs.Estimator(config, 2)
        rolled, asked = Job("roll_out", wildcards={"policy": "p"}), Job("ask_vlm", wildcards={"vlm": "gpt"})
        return costs.rollouts(config), estimator.cost(rolled), estimator.cost(asked)

    count, rolled, asked = estimates([own])
    assert count == 2 * 3 and rolled.seconds > 0 and asked.money > 0
    count, rolled, asked = estimates([own, listed])
    assert math.isnan(count) and rolled == costs.Cost(None, None) and asked.money is None
    (row,) = stages([Job("ask_vlm")], [asked])
    said = Preflight("all", 2, [row], 0.0, 0, [], [], False).text()
    assert "API cost" in said and "?" in said.splitlines()[2] and "time not known: ask_vlm" in said


def test_work_that_is_not_known_is_not_noted(tmp_path, monkeypatch):
    """Data sets of others have splits of the same names as the lab's."""
    monkeypatch.chdir(tmp_path)
    config = from_dict(Config, yaml.safe_load(MINI.read_text()))

    def noted(dataset: str) -> dict:
        job = SimpleNamespace(
            rule=SimpleNamespace(name="cache_latents"), wildcards={"dataset": dataset, "split": "train"},
            resources={"gpu": 0}, benchmark="b.jsonl",
        )  # fmt: skip
        costs.note_work(config, [job])
        return json.loads(Path(config.results, "state", "work.json").read_text())

    assert noted(config.episodes.dataset)["b.jsonl"]["units"] > 0
    assert noted("bridge_v2") == {}
    job = Job("cache_latents", wildcards={"dataset": "bridge_v2", "split": "train"})
    assert costs.Estimator(config, 2).cost(job) == costs.Cost(None, None)


@pytest.mark.parametrize(
    ("memory", "gpus", "fits"), [(80.0, 1, True), (16.0, 1, False), (16.0, 2, True), (12.0, 2, False)]
)
def test_declared_memory_must_fit(monkeypatch, memory, gpus, fits):
    config = from_dict(Config, {"policies": {"vla": {"adapter": "openvla"}}, "rollouts": {"batch": 8}})
    policy, model = needs.declared_memory(config, "vla")
    assert policy == 15 and 1 < model < 16
    monkeypatch.setattr(needs, "visible_gpus", lambda: ["GPU-a", "GPU-b"])
    monkeypatch.setattr(needs, "gpu_memory", lambda: {"GPU-a": memory, "GPU-b": 141.0})
    found = list(needs._gpus(config, [Job("roll_out", wildcards={"policy": "vla"}, gpus=gpus)], ["vla"], ""))
    assert all(need.there for need in found) == fits, found


@pytest.mark.parametrize(
    ("visible", "missing"),
    [
        (["GPU-a", "GPU-b", "GPU-c"], []),
        (["GPU-a", "GPU-b"], ["gpus.rollouts.vla: 3 are asked for, 2 visible; ask for fewer"]),
        (
            ["MIG-a", "MIG-b", "MIG-c"],
            [
                f"gpus.{key} are asked for, but a process can use only one instance of a split GPU (MIG); ask for 1"
                for key in ("world_model: 2", "rollouts.vla: 3")
            ],
        ),
        ([], []),
    ],
)
def test_gpus_that_are_asked_for_must_be_visible(monkeypatch, visible, missing):
    """Those of jobs that would run, as configured: Snakemake has lowered the jobs' own numbers to what there is."""
    config = from_dict(
        Config, {"policies": {"vla": {}, "tiny": {}}, "gpus": {"world_model": 2, "judges": 9, "rollouts": {"vla": 3}}}
    )
    monkeypatch.setattr(needs, "visible_gpus", lambda: visible)
    monkeypatch.setattr(needs, "gpu_memory", dict)
    found = needs._gpus(config, [Job("train_world_model", gpus=1)], ["tiny", "vla"], "")
    assert [need.text for need in found if not need.there] == missing


def test_environments_that_only_conda_knows(monkeypatch):
    config = from_dict(
        Config,
        {"policies": {"mine": {"env": "conda:vla"}}, "episodes": {"recorded": {"tensorflow": "tfds"}}},
    )
    text = "is used only with --use-conda; add it, or name a Python interpreter instead"
    found = [need.text for need in needs._environments(config, {"convert_dataset"}, ["mine"], [])]
    assert found == [
        f"environment conda:vla (policies.mine.env): {text}",
        f"environment tfds (episodes.recorded.tensorflow): {text}",
    ]
    assert list(needs._environments(config, {"roll_out"}, [], [])) == []
    monkeypatch.setattr(needs, "_conda", lambda: needs.Need(True, "conda"))
    assert list(needs._environments(config, {"convert_dataset"}, ["mine"], ["conda"])) == [needs.Need(True, "conda")]


def test_tokens_of_servers_are_looked_for(monkeypatch):
    monkeypatch.delenv("ABSENT_TOKEN", raising=False)
    config = from_dict(Config, {"policies": {"far": {"endpoint": "wss://far", "token_env": "ABSENT_TOKEN"}}})
    for rule in ("roll_out", "examine_policy"):
        (need,) = needs._keys(config, [Job(rule, wildcards={"policy": "far"})])
        assert not need.there and "ABSENT_TOKEN is not set" in need.text


def test_no_preflight_beside_a_run(tmp_path, monkeypatch):
    """Its stage files would be those of another configuration."""
    monkeypatch.chdir(tmp_path)
    with only_run(), pytest.raises(UserError, match="another run"):
        look(tmp_path, monkeypatch)
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("deployment", "cores", "more"), [(["conda"], 4, ["--cores", "4", "--sdm=conda"]), ([], None, [])]
)
def test_the_rule_asks_as_the_run_would(deployment, cores, more):
    workflow = SimpleNamespace(
        deployment_settings=SimpleNamespace(deployment_method=deployment),
        resource_settings=SimpleNamespace(cores=cores),
    )
    words = shlex.split(preflight_command(workflow, "a b").format())
    assert words == [sys.executable, "-m", "workflow_src.preflight", "--configfile", "a b/run_config.yaml", *more]


def test_conda_and_slurm_are_looked_for(tmp_path, monkeypatch):
    for name, said in {"conda": "echo conda 24.5.0", "sinfo": "echo cannot contact controller >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert needs._conda() == needs.Need(False, "conda 24.5.0: --use-conda needs 24.7.1 or newer")
    assert list(needs._slurm("slurm"))[-1] == needs.Need(False, "Slurm: cannot contact controller")
    assert list(needs._slurm("")) == []
    monkeypatch.setenv("PATH", "")
    assert not needs._conda().there and "not on PATH" in list(needs._slurm("slurm"))[-1].text
