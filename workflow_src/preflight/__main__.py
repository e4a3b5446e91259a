"""Before a long run: what would run and why, what it would cost, what is missing. Runs nothing.

Reading the configuration writes its stage files (<results>/run_config.yaml, <results>/config/), as a run would. Jobs read
those, so there is no preflight while a run is at work in the same folder.

Exit codes: 0 ready, 1 something is missing, 2 a mistake in the configuration or the command, 3 refused: a trained model would
be thrown away (a training whose result is there would run again), unless --allow-retraining.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import yaml

from workflow_src.checks import ROOT
from workflow_src.common.config import results_folder
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.gpus import visible_gpus
from workflow_src.common.sections import Config
from workflow_src.launch import only_run, stale_lock
from workflow_src.preflight.costs import Estimator, wall_seconds
from workflow_src.preflight.dry_run import dry_run
from workflow_src.preflight.needs import needs, retrained
from workflow_src.preflight.report import Preflight, known, stages
from workflow_src.workflow import checked

EXAMPLES = """examples:
  python -m workflow_src.preflight
  python -m workflow_src.preflight results/tables/policy_ranking.csv --configfile config/tabletop_full.yaml
  python -m workflow_src.preflight rollouts --configfile config/worldgym.yaml --use-conda --json
  python -m workflow_src.preflight --profile slurm"""


def arguments() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.preflight", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", nargs="*", help="files or rules to make (default: all)")
    parser.add_argument("--configfile", type=Path, default=ROOT / "config" / "config.yaml", help="of the run")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="override single values")
    parser.add_argument("--cores", type=int, default=0, help="of the run (default: all)")
    parser.add_argument("--profile", default="", help="of the run, e.g. slurm")
    parser.add_argument(
        "--sdm", action="append", choices=("conda", "apptainer"), default=[], help="the run will be with it"
    )
    parser.add_argument("--use-conda", action="append_const", dest="sdm", const="conda", help="the same as --sdm conda")
    parser.add_argument("--allow-retraining", action="store_true", help="do not refuse to train again what is trained")
    parser.add_argument("--json", action="store_true", help="for scripts")
    return parser.parse_args()


def preflight(options: argparse.Namespace) -> Preflight:
    """Ask Snakemake, then estimate and look."""
    if not options.configfile.is_file():
        raise UserError(
            f"--configfile: '{options.configfile}' is not a file; the project's own are in {ROOT / 'config'}"
        )
    cores = options.cores or len(os.sched_getaffinity(0))
    given = ["--configfile", str(options.configfile), *(["--config", *options.config] if options.config else [])]
    given += ["--profile", options.profile] if options.profile else ["--cores", str(cores)]
    with contextlib.ExitStack() as stack:
        # By its rule, it is the run at work that asks, and the files are its own.
        if "REHEARSAL_PARENT" not in os.environ:
            stack.enter_context(only_run())
            stale_lock()
        jobs = dry_run(given, options.target)
        config = _merged(options)

    estimator = Estimator(config, cores)
    costs = [estimator.cost(job) for job in jobs]
    rows = stages(jobs, costs)
    gpus = len(visible_gpus()) if not options.profile else sum(job.gpus for job in jobs)
    seconds = [cost.seconds or 0.0 for cost in costs]
    return Preflight(
        target=" ".join(options.target) or "all",
        cores=cores,
        stages=rows,
        wall=wall_seconds(jobs, seconds, None if options.profile else cores, gpus),
        measured_here=sum(count for _, count in estimator.here.values()),
        needs=needs(config, jobs, known(row.bytes for row in rows), options.sdm, options.profile),
        retrained=retrained(jobs, Path.cwd()),
        allowed=options.allow_retraining,
    )


def _merged(options: argparse.Namespace) -> Config:
    """What Snakemake merged and checked, which lies where its results go."""
    results = results_folder(options.configfile, options.config)
    return checked(yaml.safe_load((Path(results) / "run_config.yaml").read_text(encoding="utf-8"))).config


def main() -> None:
    """Entry point."""
    options = arguments()
    found = preflight(options)
    print(json.dumps(found.as_json(), indent=1) if options.json else found.text())
    sys.exit(found.code)


if __name__ == "__main__":
    run_cli(main)
