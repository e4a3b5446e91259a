"""Serve a policy for as long as somebody in this process asks it: a child process in the policy's own environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def served(
    config: Path,
    policy: str,
    networks: Path,
    endpoint: Path,
    log: Path,
    python: str = sys.executable,
    threads: int = 1,
    gpus: int | None = None,
) -> Iterator[Path]:
    """`endpoint`, the endpoint file of `policy` of the stage file `config`, served until the context is left.

    `python`: interpreter of the policy's environment, which need not have this package installed. `gpus`: how many it leases,
    for itself and a world model; None: it uses those that are visible, which the caller may have leased.
    """
    command = [
        python, "-m", "workflow_src.policies.serve", "--config", config, "--policy", policy, "--networks", networks,
        "--endpoint-file", endpoint, "--log", log, "--threads", threads,
    ]  # fmt: skip
    command += [] if gpus is None else ["--gpus", gpus]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    endpoint.unlink(missing_ok=True)  # of a server that was killed
    server = subprocess.Popen(list(map(str, command)), env={**os.environ, "PYTHONPATH": path})
    try:
        yield endpoint
    finally:
        server.terminate()
        server.wait()
