"""`make test`: every check in order, the seconds of each, and what was skipped and why. Exit code 1 if one failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

# Whole files on each worker: tests of a file share what they set up.
WORKERS = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
STEPS = [
    ("ruff", [BIN / "ruff", "check", "."], 120),
    ("format", [BIN / "ruff", "format", "--check", "."], 120),
    ("snakefmt", [BIN / "snakefmt", "--check", "Snakefile", "rules"], 120),
    ("tests", [sys.executable, "-m", "pytest", "-q", *WORKERS, *sys.argv[1:]], 3600),
]


def main() -> int:
    """Run the steps; a failing one does not stop the later ones, so one run shows everything."""
    # One OpenMP thread a process: the suite starts many processes, and idle threads that spin would starve them.
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "PASSIVE"}
    failed = []
    for name, command, limit in STEPS:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            code = subprocess.run(
                list(map(str, command)), cwd=ROOT, env=environment, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {limit} s"
        print(f"== {name}: {'ok' if code == 0 else f'FAILED ({code})'}, {time.monotonic() - started:.0f} s", flush=True)
        if code:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
