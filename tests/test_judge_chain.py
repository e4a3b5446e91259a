"""Further judges in the workflow: a model behind a server, and people; from a finished run to corrected rates."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import yaml

from tests.chain import MINI, copy_of, errors, run, tables
from tests.vlm_server import VlmServer
from workflow_src.judges import label


def configured(folder, **judges):
    """The miniature configuration with further judges."""
    config = yaml.safe_load(MINI.read_text())
    config["judges"] |= judges
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def rules_of(done):
    """Names of the rules that a run lists as its jobs."""
    lines = done.stdout.split("total")[0].splitlines() + done.stderr.split("total")[0].splitlines()
    return {words[0] for line in lines if len(words := line.split()) == 2 and words[1].isdigit()}


def test_a_model_and_people_join_a_finished_run(finished, tmp_path, monkeypatch):
    folder = copy_of(finished, tmp_path / "run")
    results = folder / "results"
    rollouts = sorted(results.glob("rollouts/*/*/shard_0/rollouts.parquet"))

    # A person labels four generated clips of each policy and verdict, the other way round than the judge where they can.
    monkeypatch.setattr(label, "die_with_parent", lambda: None)
    arguments = ["--rollouts", *rollouts, "--judgements", results / "judgements" / "learned.parquet", "--judge",
                 "classifier", "--out", tmp_path / "labelling", "--count", 200, "--lab-count", 2]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["label", *map(str, arguments)])
    label.main()
    sample = pd.read_csv(tmp_path / "labelling" / "sample.csv")
    assert (sample["weight"][sample["world"] == "world_model"] == 1).all()  # 18 rollouts, all of them drawn
    outcome = sample["stratum"].str.endswith("success")
    sample.assign(label=[str(int(i % 5 == 0) ^ int(yes)) for i, yes in enumerate(outcome)], labeller="anna")[
        ["clip", "label", "labeller"]
    ].to_csv(tmp_path / "labels.csv", index=False)

    with VlmServer() as server:
        vlm = {"gpt": {"model": "stub", "base_url": server.url, "votes": 1, "frames": 1}}
        human = {"labels": [str(tmp_path / "labels.csv")], "sample": str(tmp_path / "labelling" / "sample.csv")}
        config = configured(tmp_path, vlm=vlm, human=human, primary="gpt")
        done = run(folder, config=config)
        made = rules_of(done)
        assert {"ask_vlm", "calibrate_vlm", "read_labels", "tabulate_calibration", "make_tables"} <= made
        assert not made & {"train_judge", "judge_rollouts", "calibrate_judges", "roll_out"}
        asked = len(server.bodies)
        # Six trials, three policies, two worlds; clips that are alike are asked about once.
        assert 0 < asked <= 36 + 5 * 18
        (results / "judgements" / "gpt.parquet").unlink()
        run(folder, "results/judgements/gpt.parquet", config=config)
        assert len(server.bodies) == asked

    found = tables(folder)
    ranking = found["policy_ranking"]
    assert (ranking["judge"] == "gpt").all() and (ranking["n_labels"] == 6).all()
    assert set(found["judge"]["judge"]) == {"classifier", "gpt", "human", "state"}
    calibration = pd.read_csv(results / "tables" / "calibration.csv")
    assert set(calibration["judge"]) == {"classifier", "gpt", "human", "state"}
    generated = calibration[(calibration["video"] == "generated") & (calibration["policy"] == "all")]
    assert (generated["n"] == 18).all()
    corrected = pd.read_csv(results / "tables" / "corrected.csv")
    assert set(corrected["judge"]) == {"classifier", "gpt", "state"} and (corrected["n_labels"] == 6).all()


@pytest.mark.parametrize("target", ["results/judgements/gpt.parquet", "all"])
def test_a_missing_key_stops_a_run_before_its_first_job(tmp_path, monkeypatch, target):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = run(tmp_path, target, check=False, config=configured(tmp_path, vlm={"gpt": {"model": "m"}}))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = errors(done)
    assert line.startswith("error: judges.vlm.gpt.key_env: environment variable OPENAI_API_KEY is not set")
    assert not (tmp_path / "results" / "trials").exists()
