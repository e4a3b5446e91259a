"""Train variants of the world model on a finished run's latents and compare them: fidelity, and policies in imagination.

    python benchmarks/ablate_world_model.py results --steps 400 base \\
        factorised:network.attention=factorised,network.temporal=rope,network.spatial_rope=standard \\
        adamw:training.optimizer=adamw
    python benchmarks/ablate_world_model.py results --steps 1700 --policies base long:training.steps=3400

Each variant is `name[:path=value,…]`, paths inside the section `world_model`. One process, one thread; prints a line each
and appends it to `<results>/ablations.csv`. Development only: the run it stands on must not be one whose figures are reported.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workflow_src.common.config import load, load_stage, to_dict
from workflow_src.episodes.store import EpisodeStore
from workflow_src.training import replay
from workflow_src.training import world_model as training
from workflow_src.training.clip_source import ClipSource
from workflow_src.training.datasets import open_training
from workflow_src.training.distributed import join
from workflow_src.training.engine import Engine
from workflow_src.world_model.artefact import WorldModel, build_network
from workflow_src.world_model.environment import imagine
from workflow_src.world_model.tokenizer import load_tokenizer

HORIZONS = (1, 2, 4, 8, 12, 18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of a finished run")
    parser.add_argument("variants", nargs="+", help="name[:path=value,…]")
    parser.add_argument("--steps", type=int, default=400, help="training steps, unless a variant says otherwise")
    parser.add_argument("--policies", action="store_true", help="also roll the run's policies out and judge them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for variant in options.variants:
        name, _, changes = variant.partition(":")
        row = measure(options.results, name, changes, options.steps, options.policies)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        _append(options.results / "ablations.csv", row)


def measure(results: Path, name: str, changes: str, steps: int, policies: bool) -> dict[str, object]:
    """Train one variant; PSNR on held-out replays by horizon and, on request, agreement of the policies' success."""
    stage = load_stage(_stage_file(results, name, changes, steps))
    data = results / "episodes" / "tabletop"
    cache = results / "latents" / "tabletop" / "train" / "latents.json"
    datasets = open_training(stage.world_model, [data / "train"], [cache], results / "tokenizer", join())
    source = ClipSource(stage.world_model, datasets, join())
    card = training.make_card(stage, source)
    loss = training.DiffusionForcing(card, stage.world_model, source, seed=5)
    torch.manual_seed(1)
    state = results / "state" / "ablations" / name
    shutil.rmtree(state, ignore_errors=True)
    loss.show_own_frames(state, name)
    engine = Engine(build_network(card), loss, stage.world_model.training, seed=5, state=state, digest=name, label=name,
                    prepare=loss.prepare)  # fmt: skip
    began = time.process_time()
    network = engine.run().eval()
    seconds = time.process_time() - began
    model = WorldModel(card, network, load_tokenizer(results / "tokenizer"), "")
    held_out = EpisodeStore(data / "validation").load_all()
    imagined = imagine(model, held_out.images[:, 0], held_out.actions, 1, range(len(held_out.images)))
    fidelity = replay.psnr(imagined, held_out.images[:, 1:]).mean(0)
    row: dict[str, object] = {"variant": name, "changes": changes, "steps": stage.world_model.training.steps,
                              "ms_per_step": round(1000 * seconds / stage.world_model.training.steps)}  # fmt: skip
    row |= {f"psnr_{h}": round(float(fidelity[h - 1]), 2) for h in HORIZONS if h <= len(fidelity)}
    return row | (agreement(results, model) if policies else {})


def _stage_file(results: Path, name: str, changes: str, steps: int) -> Path:
    path = results / "config" / "world_model.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # With today's defaults for what the run did not know yet.
    section = content["world_model"] = to_dict(load_stage(path).world_model)
    section["training"] |= {"steps": steps, "checkpoint_every": 10**9}
    for change in filter(None, changes.split(",")):
        path, _, value = change.partition("=")
        *parents, last = path.split(".")
        node = section
        for parent in parents:
            node = node[parent]
        node[last] = value if isinstance(node[last], str) else json.loads(value)
    path = results / "state" / "ablations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def agreement(results: Path, model: WorldModel) -> dict[str, object]:
    """Imagined against real success over the run's policies, without servers: same loop, same judge."""
    import pandas as pd

    from workflow_src.judges.classifier import ClassifierJudge
    from workflow_src.judges.interface import Clip
    from workflow_src.judges.network import load_judge
    from workflow_src.policies.adapter import Observation
    from workflow_src.policies.adapter import load as load_policy
    from workflow_src.rollouts.loop import Item, roll_out
    from workflow_src.rollouts.trials import load_trials
    from workflow_src.world_model.environment import WorldModelEnv

    class Local:
        """A policy in this process, with the client's interface."""

        def __init__(self, adapter):
            self.adapter, self.metadata = adapter, adapter.metadata

        def infer(self, observation):
            return self.adapter.act(Observation(**observation))

    config = load(results / "run_config.yaml")
    items = [Item(trial, 0) for trial in load_trials(results / "trials" / "trials.json")]
    judge = ClassifierJudge(*load_judge(results / "judge" / "model.safetensors"), config.judges.batch)
    real = pd.read_csv(results / "tables" / "policy_ranking.csv").set_index("policy")["success_real"]
    imagined = {}
    for name, policy in config.policies.items():
        client = Local(load_policy(name, policy, results / "policies", config.lab, config.seed, config.rollouts.batch))
        world = WorldModelEnv(config.rollouts.batch, model, seed=config.seed, horizon=config.lab.horizon)
        verdicts = []
        for batch in roll_out(world, client, items, config.lab.horizon):
            clips = [
                Clip(r.item.trial.trial_id, name, "world_model", 0, r.item.trial.task, r.item.trial.instruction, None,
                     r.frames, None)
                for r in batch
            ]  # fmt: skip
            verdicts += [bool(verdict.success_at_end) for verdict in judge.judge(clips)]
        world.close()
        imagined[name] = float(np.mean(verdicts))
        print(f"{name:<14} imagined {imagined[name]:.2f}  real {real[name]:.2f}", flush=True)
    gap = pd.Series(imagined) - real[list(imagined)]
    pearson = float(np.corrcoef(list(imagined.values()), real[list(imagined)])[0, 1])
    return {"pearson": round(pearson, 3), "mae": round(float(gap.abs().mean()), 3), "bias": round(float(gap.mean()), 3)}


def _append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as handle:
        columns = [
            "variant",
            "changes",
            "steps",
            "ms_per_step",
            *(f"psnr_{h}" for h in HORIZONS),
            "pearson",
            "mae",
            "bias",
        ]
        writer = csv.DictWriter(handle, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
