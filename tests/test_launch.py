"""`rehearse`: one run at a time, however it is stopped nobody is left, and what it hands on to Snakemake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.chain import MINI, ROOT, assert_nobody_left, copy_of, rollouts, wait_for
from workflow_src.workflow import WORLDS

LAUNCH = [sys.executable, "-m", "workflow_src.launch"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [*LAUNCH, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_help_shows_examples(tmp_path):
    done = launch(tmp_path, "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "--configfile" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "seeed=3"], "error: seeed: unknown key; did you mean 'seed'?"),
        (["--configfile", "absent.yaml"], "error: --configfile: 'absent.yaml' is not a file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, line):
    done = launch(tmp_path, *arguments)
    assert done.returncode == 2
    own = ("Config file", "Using workflow specific profile")  # Snakemake's
    said = [text for text in done.stderr.splitlines() if not text.startswith(own)]
    assert len(said) == 1 and said[0].startswith(line), done.stderr
    assert not (tmp_path / "results").exists()


def test_targets_settings_and_snakemakes_own_options_are_handed_on(tmp_path):
    """A target that is not the whole chain succeeds, without a summary that there cannot be."""
    settings = ["--configfile", str(MINI), "--config", "seed=7", "results=elsewhere"]
    done = launch(tmp_path, "elsewhere/trials/trials.json", *settings)
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in (tmp_path / "elsewhere" / "run_config.yaml").read_text()
    assert [path.name for path in (tmp_path / "elsewhere" / "trials").glob("*.json")] == ["trials.json"]
    assert "Policy ranking" not in done.stdout

    done = launch(tmp_path, *settings, "--", "--dry-run", "--cores", "1", "--quiet", "rules")
    assert done.returncode == 0 and "train_world_model" in done.stdout
    assert not (tmp_path / "elsewhere" / "tokenizer").exists()


def test_a_second_run_shows_the_ranking_again(finished, tmp_path):
    done = launch(copy_of(finished, tmp_path / "run"), "--configfile", str(MINI))
    assert done.returncode == 0, done.stderr
    assert "Policy ranking" in done.stdout and "this run, wall time" in done.stdout


def test_an_interrupt_that_snakemake_swallows_stops_it_all_the_same():
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    run = f"from workflow_src import launch; launch.PATIENCE = 1; print(launch._run([{sys.executable!r}, '-c', {deaf!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", run], env=ENVIRONMENT, start_new_session=True, text=True, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[0] == f"{-signal.SIGTERM}\n"


def test_however_a_run_is_stopped_nobody_is_left_and_it_continues(finished, tmp_path):
    """Ctrl-C, SIGTERM and SIGKILL of the launcher while policies are served and rolled out."""
    folder = copy_of(finished, tmp_path / "run", "rollouts", "judgements", "tables")
    command = [*LAUNCH, "results/tables/policy_ranking.csv", "--cores", "2", "--configfile", str(MINI)]
    endpoints = folder / "results" / "endpoints"
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_for(lambda: any(endpoints.rglob("*.json")), process)
        second = launch(folder, "--configfile", str(MINI))
        assert second.returncode == 2
        assert second.stderr == (
            f"error: another run (process {process.pid}) is at work in {folder}; wait for it, or stop it first\n"
        )
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == (-how if how == signal.SIGKILL else 1), said
        assert how == signal.SIGKILL or "the same command continues" in said
        assert_nobody_left(folder)
    done = launch(folder, "results/rollouts/lab/random/shard_0/rollouts.parquet", *command[4:])
    assert done.returncode == 0, done.stderr[-6000:]
    for world in WORLDS:
        pd.testing.assert_frame_equal(rollouts(folder, "random", world), rollouts(finished, "random", world))
