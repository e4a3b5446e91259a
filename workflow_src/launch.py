"""`rehearse`: Snakemake with this project's habits, for people who do not want to know Snakemake.

Runs one workflow at a time per working directory, clears what a killed run left behind, continues where it stopped, and
ends with the summary. Everything after `--` goes to Snakemake as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from workflow_src.common.config import results_folder
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import PR_SET_PDEATHSIG, descendants
from workflow_src.common.progress import say
from workflow_src.workflow import ROOT

MISTAKE = 2  # Snakemake's exit code where configuration or command line are wrong; the line that says so is printed
PATIENCE = 15  # seconds after Ctrl-C: no checkpoint takes that long
EPILOG = """examples:
  rehearse                                     the default ranking with figures, gallery and notebook
  rehearse results/tables/policy_ranking.csv   the ranking alone
  rehearse --configfile config/tabletop_full.yaml
  rehearse --config seed=3 results=results/seed3
  rehearse -- --dry-run --cores 1              what would run, and why"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rehearse", description=__doc__.split("\n\n")[0], epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("targets", nargs="*", help="files or rules to make (default: all)")
    parser.add_argument("--cores", default="all", help="processor cores to use (default: all)")
    parser.add_argument("--configfile", default="", help="YAML file instead of config/config.yaml")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="override single values")
    # argparse would hand what follows `--` to the first positional argument.
    given = sys.argv[1:] if arguments is None else arguments
    own, passed = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = parser.parse_args(own)

    if options.configfile and not Path(options.configfile).is_file():
        raise UserError(
            f"--configfile: {options.configfile!r} is not a file; the project's own are in {ROOT / 'config'}"
        )
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--rerun-incomplete"]
    if "--cores" not in passed:
        command += ["--cores", options.cores]
    command += ["--configfile", options.configfile] if options.configfile else []
    command += ["--config", *options.config] if options.config else []
    started = time.time()
    with only_run():
        _clear_stale_lock(command)
        # Targets follow `--`: `--config` would otherwise swallow them.
        code = _run([*command, *passed, "--", *options.targets])
    if code:
        if code != MISTAKE:
            say("stopped before the end: finished work is kept, the same command continues")
        sys.exit(code if code > 0 else 128 - code)
    if not passed:
        _show_summary(options, started)


class only_run:
    """Holds an exclusive lock that Snakemake inherits: it is free only when launcher and Snakemake are both gone."""

    def __enter__(self) -> None:
        path = Path(".snakemake") / "rehearse.lock"
        path.parent.mkdir(exist_ok=True)
        self._handle = open(path, "a+")
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._handle.seek(0)
            who = self._handle.read().strip() or "unknown"
            raise UserError(
                f"another run (process {who}) is at work in {Path.cwd()}; wait for it, or stop it first"
            ) from None
        self._handle.truncate(0)
        self._handle.write(f"{os.getpid()}\n")
        self._handle.flush()
        os.set_inheritable(self._handle.fileno(), True)

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _clear_stale_lock(command: list[str]) -> None:
    """Remove Snakemake's lock after a `kill -9`, but only when no Snakemake works in this directory."""
    if locks := stale_lock():
        say("a run was killed here; removing its lock and continuing where it stopped")
        shutil.rmtree(locks)
        locks.mkdir()


def stale_lock() -> Path | None:
    """The folder of a lock that a killed Snakemake left. Raises UserError where the one that locked is still at work."""
    locks = Path(".snakemake") / "locks"
    if not locks.is_dir() or not any(locks.iterdir()):
        return None
    if others := _snakemakes_here():
        raise UserError(f"Snakemake (process {others[0]}) is at work in {Path.cwd()}; wait for it, or stop it first")
    return locks


def _snakemakes_here() -> list[int]:
    here, found = os.getcwd(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            same_place = os.readlink(folder / "cwd") == here
        except OSError:  # gone, or somebody else's
            continue
        if same_place and any(word.endswith(b"snakemake") for word in words[:4]) and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def _run(command: list[str]) -> int:
    """Run Snakemake and wait for it. Nothing outlives the launcher, however it ends."""

    def follow_the_launcher() -> None:
        if sys.platform.startswith("linux"):
            # SIGKILL, because on SIGTERM Snakemake waits for its jobs, perhaps for days; they notice its death.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    with subprocess.Popen(command, close_fds=False, preexec_fn=follow_the_launcher) as process:
        # Ctrl-C reaches Snakemake and its jobs through the terminal; the launcher only waits for them. Now and then it comes
        # while Snakemake's event loop is closing, which swallows it (Python's asyncio.Runner): then the launcher stops it.
        signal.signal(signal.SIGINT, lambda *_: signal.alarm(PATIENCE))
        signal.signal(signal.SIGALRM, lambda *_: _stop(process))
        signal.signal(signal.SIGTERM, lambda *_: _stop(process))
        return process.wait()


def _stop(process: subprocess.Popen) -> None:
    """No new jobs, and an end to those that run: trainings write a checkpoint, servers and rollouts leave."""
    process.terminate()
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):
            # Shells and `tee` end by themselves, after the last words of what they wait for.
            if Path(f"/proc/{pid}/comm").read_text().strip() not in ("bash", "sh", "tee"):
                os.kill(pid, signal.SIGTERM)


def _show_summary(options: argparse.Namespace, started: float) -> None:
    results = results_folder(options.configfile or ROOT / "config" / "config.yaml", options.config)
    # A run towards another target may not have come that far.
    if (Path(results) / "tables" / "policy_ranking.csv").is_file():
        from workflow_src.analysis.summary import print_summary

        print_summary(Path(results), seconds=time.time() - started)


def cli() -> None:
    """Entry point of the installed command."""
    run_cli(main)


if __name__ == "__main__":
    cli()
