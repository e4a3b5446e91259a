"""The workflow as a user runs it: miniature chain, second run, shards, configurations."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.chain import MINI, ROOT, assert_same_tables, copy_of, processes_of, run, tables


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


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_builds_its_graph(tmp_path, config):
    without_policies = {"worldgym.yaml": ("results/worldgym/figures/sweeps/sheet.png", "import_world_model")}
    target, rule = without_policies.get(config.name, ("results/tables/policy_ranking.csv", "serve_policy"))
    done = run(tmp_path, "--dry-run", target, config=config)
    assert re.search(rf"{rule}\s+\d+", done.stdout)
