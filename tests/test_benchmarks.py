"""Benchmarks are run by hand and rarely; what they import and how they are called is checked always."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "measure")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_and_shows_how_it_is_called(name, monkeypatch, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0 and f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["sampler.py", "--batches", "1", "--frames", "2"], ["training.py", "--batches", "1", "--steps", "1"]]
)
def test_speed_is_measured_row_by_row(arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 1 |")]
    assert len(rows) == (3 if arguments[0] == "sampler.py" else 2)
    assert all("×" in row or "%" in row for row in rows)
