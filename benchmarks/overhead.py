"""What a run costs besides its work: the jobs of a configuration with next to nothing to do in them.

Keeps every job (stages, policies, services, figures, notebook) and shrinks what each does to one training step, a few
episodes and one trial per task. What is left is imports, Snakemake, starting and stopping services, and fixed drawing.
Runs in a temporary folder; prints wall time and seconds per stage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
EPISODES = {"train": 24, "validation": 4, "judge": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", type=Path, nargs="?", default=ROOT / "config" / "config.yaml", help="(default: config/config.yaml)"
    )
    source = parser.parse_args().config
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(shrink(yaml.safe_load(source.read_text(encoding="utf-8"))), sort_keys=False))
        began = time.monotonic()
        command = [sys.executable, "-m", "workflow_src.launch", "--configfile", str(config)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        print(done.stdout[done.stdout.index("Time per stage") :].partition("\n\n")[0])
        print(f"wall time of the command     {time.monotonic() - began:6.1f} s")


def shrink(config: dict) -> dict:
    """The same jobs, each with as little work as the configuration admits."""
    config["episodes"] = {"splits": {name: {"episodes": count} for name, count in EPISODES.items()}}
    for section in (config["tokenizer"], config["world_model"], config["judges"]):
        section["training"] |= {"steps": 1, "batch": 2}
    steps = {}
    for name, network in config["behaviour_cloning"].items():
        steps[name] = {snapshot: place for place, snapshot in enumerate(sorted(network["snapshots"]), 1)}
        network["snapshots"] = list(steps[name].values())
        network["training"] |= {"steps": len(steps[name]), "batch": 2}
    for policy in config["policies"].values():
        if "snapshot" in policy:
            policy["snapshot"] = steps[policy["network"]][policy["snapshot"]]
    config["trials"] = {"per_task": 1}
    config["rollouts"] = {"batch": 3}
    return config


if __name__ == "__main__":
    main()
