"""The workflow as a user runs it: miniature chain, second run, shards, configurations."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest
import yaml

from tests.chain import MINI, ROOT, assert_same_tables, copy_of, processes_of, run, tables
from tests.test_config import CONFIGS


def test_a_run_makes_everything_the_readme_names(finished):
    ranking = tables(finished)["policy_ranking"]
    assert set(ranking["policy"]) == {"bc_3", "bc_6", "random"}
    assert (ranking["n_imagined"] == 6).all() and (ranking["n_real"] == 6).all()
    results = finished / "results"
    for name in ("figures/policy_ranking.png", "gallery/index.html", "notebooks/policy_ranking.html"):
        assert (results / name).stat().st_size > 1000, name
    assert "seed: 5" in (results / "run_config.yaml").read_text()
    assert processes_of(finished) == []


def test_a_second_run_does_nothing(finished):
    assert _nothing(run(finished))


def _nothing(done: subprocess.CompletedProcess) -> bool:
    return "Nothing to be done" in done.stdout + done.stderr


def test_touched_sources_rerun_nothing(finished):
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk"), *(ROOT / "workflow_src").rglob("*.py")]:
        os.utime(path)
    assert _nothing(run(finished, "--dry-run"))


def test_shards_change_nothing(finished, tmp_path):
    """Same models, rollouts split over two jobs per policy: same tables."""
    folder = copy_of(finished, tmp_path / "sharded", "rollouts", "judgements", "tables")
    config = tmp_path / "sharded.yaml"
    config.write_text(MINI.read_text().replace("rollouts: {batch: 4}", "rollouts: {batch: 4, shards: 2}"))
    run(folder, "results/tables/policy_ranking.csv", config=config)
    assert_same_tables(finished, folder)


def test_photographs_are_ranked_without_real_results_and_with_somebodys_own(finished, tmp_path):
    """First frames that no lab can start from: ranked by imagination alone; a CSV of real results is set beside it."""
    folder = copy_of(finished, tmp_path / "photographs", "trials", "rollouts", "judgements", "tables")
    shutil.copytree(finished / "results" / "trials", tmp_path / "photos", ignore=shutil.ignore_patterns("trials.json"))
    for path in (tmp_path / "photos").rglob("*.json"):
        fields = json.loads(path.read_text())
        del fields["initial_state"]
        path.write_text(json.dumps(fields))
    ranking, override = "results/tables/policy_ranking.csv", f"trials={{root: {tmp_path / 'photos'}}}"
    run(folder, "--", ranking, overrides=(override,))
    table = pd.read_csv(folder / ranking)
    assert table["rank_imagined"].notna().all() and (table["n_imagined"] == 6).all()
    assert table[["rank_real", "success_real", "n_real"]].isna().all(axis=None)
    assert (folder / "results/tables/agreement.csv").is_file()

    rows = [f"{policy},{task},{rate},20,us" for policy, rate in (("bc_3", 0.2), ("bc_6", 0.6), ("random", 0.0))
            for task in ("lift", "push_left")]  # fmt: skip
    (tmp_path / "reality.csv").write_text("\n".join(["policy,task,success,n,source", *rows]) + "\n")
    run(folder, "--", ranking, overrides=(override, f"reality={tmp_path / 'reality.csv'}"))
    table = pd.read_csv(folder / ranking).set_index("policy")
    assert table["rank_real"].to_dict() == {"bc_6": 1, "bc_3": 2, "random": 3}
    assert table["success_real"]["bc_6"] == pytest.approx(0.6) and (table["n_real"] == 40).all()


def test_the_doctor_passes_the_tabletops_own_policies(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "examined")
    run(folder, "doctor")
    for policy in ("bc_3", "bc_6", "random"):
        found = pd.read_csv(folder / "results" / "doctor" / f"{policy}.csv").set_index("check")["outcome"]
        assert len(found) == 12 and set(found) == {"passed", "not judged"}, policy
        assert found["same_seed"] == found["other_seed"] == found["image"] == "passed"


def test_wrong_configuration_stops_before_any_job_with_one_line(tmp_path):
    done = run(tmp_path, "--dry-run", check=False, overrides=("lab={horizn: 3}",))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == [f"error: lab.horizn: unknown key; did you mean 'horizon'? Allowed: {_lab_keys()}"]
    assert "Traceback" not in done.stderr


def _lab_keys() -> str:
    from dataclasses import fields

    from workflow_src.common.sections import Lab

    return ", ".join(sorted(field.name for field in fields(Lab)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_builds_its_graph(tmp_path, config):
    if config.name == "quick_start.yaml":  # no policies: there is nothing to rank
        done = run(tmp_path, "results/quick_start/world_model/model.safetensors", "--dry-run", config=config)
        assert re.search(r"download_dataset\s+1\b", done.stdout)
        return
    results = yaml.safe_load(config.read_text()).get("results", "results")
    done = run(tmp_path, f"{results}/tables/policy_ranking.csv", "--dry-run", config=config)
    served, rolled = (int(re.search(rf"{rule}\s+(\d+)", done.stdout)[1]) for rule in ("serve_policy", "roll_out"))
    assert served == rolled >= 12
    if config.name == "worldgym.yaml":
        # Policies times shards, over the suites that there are frames of; the others are named.
        assert served == 6 * 4 and re.search(r"fetch_first_frames\s+2", done.stdout)
        assert "trials: suite bridge_17: no first frames, left out: eggplant_into_pot_easy" in done.stderr
