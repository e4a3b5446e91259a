"""Build an environment without conda, from its lock file envs/<name>.lock: a folder per content of the lock.

    python envs/build.py lerobot      # prints the interpreter, for `policies.<policy>.env` in a configuration
    python envs/build.py tfds         # … for `episodes.recorded.tensorflow`

It lies outside the project, in $REHEARSAL_ENVIRONMENTS or ~/.cache/rehearsal/environments, is built once, and anew when the
lock changes. Nothing but what the lock names is installed (`--no-deps`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LOCKS = Path(__file__).resolve().parent


def interpreter(name: str) -> Path:
    """The Python of environment `name`, whether or not it is built."""
    cache = Path(os.environ.get("REHEARSAL_ENVIRONMENTS") or Path.home() / ".cache" / "rehearsal" / "environments")
    lock = (LOCKS / f"{name}.lock").read_bytes()
    content = hashlib.sha256(lock + sys.version.encode()).hexdigest()[:12]
    return cache / f"{name}-{content}" / "bin" / "python"


def build(name: str) -> Path:
    """Build what is not there yet. A folder that has its final name is complete."""
    python = interpreter(name)
    if python.is_file():
        return python
    final = python.parents[1]
    unfinished = final.with_name(f".{final.name}-{os.getpid()}")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        venv.create(unfinished, with_pip=True)
        subprocess.run(
            [unfinished / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--requirement", LOCKS / f"{name}.lock"],
            check=True,
        )  # fmt: skip
        os.replace(unfinished, final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return python


def main() -> None:
    """Entry point."""
    locks = sorted(path.stem for path in LOCKS.glob("*.lock"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python envs/build.py"
    )
    parser.add_argument("name", choices=locks)
    print(build(parser.parse_args().name))


if __name__ == "__main__":
    main()
