"""Replay successful actions, spoiled in known ways, in both worlds: what fails in the lab should fail in imagination.

For every trial that some policy solved in the lab, the recorded actions of the best such policy are played again from the
same first frame, as they were and corrupted. The records look like those of policies named after the corruptions, so
judges and tables need to know nothing of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import digest, sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress, say
from workflow_src.common.seeds import rng
from workflow_src.embodiments import get
from workflow_src.rollouts.loop import Item, roll_out
from workflow_src.rollouts.records import Recorder, Source, read_records
from workflow_src.rollouts.run import model_digest, trials_digest
from workflow_src.rollouts.trials import Trial, load_trials
from workflow_src.rollouts.worlds import make_lab, make_world_model

OFFSET = 0.04  # metres
REVISION = 1  # raise when a corruption changes
EXAMPLES = """examples:
  python -m workflow_src.rollouts.corruptions --config results/config/corruptions.json \\
      --trials results/trials/trials.json --rollouts results/rollouts/lab/*/shard_*/rollouts.parquet \\
      --world-model results/world_model/model.safetensors --out results/corrupted
"""

# ---- what is spoiled ------------------------------------------------------------------------------------------------


def _as_recorded(actions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return actions


def _gripper_open(actions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    actions[:, 6] = 1.0
    return actions


def _offset(actions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The whole path shifted sideways, as soon as the largest step of the recording leaves room for it."""
    axis, sign = generator.integers(2), generator.choice([-1.0, 1.0])
    room = np.abs(actions[:, :2]).max() - sign * actions[:, axis]
    actions[:, axis] += sign * np.diff(np.minimum(np.cumsum(room), OFFSET), prepend=0.0)
    return actions


def _frozen(actions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    actions[:, :6] = 0.0
    actions[:, 6] = actions[0, 6]
    return actions


def _reversed(actions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return actions[::-1]


def _shuffled(actions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(actions)


# Name → function of recorded actions float32 (T, 7) metric, which it may change, and the trial's generator.
CORRUPTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as_recorded": _as_recorded, "gripper_open": _gripper_open, "offset": _offset, "frozen": _frozen,
    "reversed": _reversed, "shuffled": _shuffled,
}  # fmt: skip


def corrupt(name: str, actions: np.ndarray, trial: Trial) -> np.ndarray:
    """`actions (T, 7)` spoiled by corruption `name`; what is random depends on the trial alone."""
    generator = rng(trial.seed, "corruption", name)
    return np.ascontiguousarray(CORRUPTIONS[name](actions.astype(np.float32), generator), np.float32)


# ---- what is replayed -----------------------------------------------------------------------------------------------


def solved(tables: list[Path]) -> dict[str, np.ndarray]:
    """Trial id → actions `(T, 7)` of a lab rollout that ended in success, of the policy with the most such rollouts.

    Raises `UserError` where there is none at all, or a file was lost or damaged.
    """
    rows = pd.concat([read_records(table) for table in tables], ignore_index=True)
    rows = rows[(rows["world"] == "lab") & rows["success_at_end"].fillna(False).astype(bool)]
    if not len(rows):
        raise UserError("rollouts: no policy solved any trial in the lab; there are no successful actions to corrupt")
    rows["solved"] = rows.groupby("policy")["policy"].transform("size")
    best = rows.sort_values(["trial_id", "solved", "policy", "repeat"], ascending=[True, False, True, True])
    return {row.trial_id: _actions(row) for row in best.drop_duplicates("trial_id").itertuples()}


def _actions(row: Any) -> np.ndarray:
    if not Path(row.arrays).is_file() or sha256_file(row.arrays) != row.sha256_arrays:
        raise UserError(f"{row.arrays}: missing or damaged; delete rollouts.parquet beside it and run again")
    with np.load(row.arrays) as arrays:
        return arrays["actions"]


class Replay:
    """Plays given actions: what the loop needs of a policy. `actions`: episode number → `(T, 7)`."""

    def __init__(self, name: str, actions: dict[int, np.ndarray]):
        self.metadata, self.actions = SimpleNamespace(name=name, execution="all", extra={}), actions

    def infer(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """All actions at once, so that it is asked only before the first step."""
        return {"actions": np.stack([self.actions[int(episode)] for episode in observation["episode"]])}


def replay(stage: Stage, options: argparse.Namespace) -> None:
    """Every corruption in the lab, then every one in the world model."""
    trials, recorded = load_trials(options.trials), solved(options.rollouts)
    items = [Item(trial, 0) for trial in trials if trial.trial_id in recorded]
    say(f"{len(items)} of {len(trials)} trials were solved by some policy in the lab")
    weights, lab, batch = model_digest(options.world_model), stage.lab, stage.rollouts.batch
    key = [stage.digest, trials_digest([item.trial for item in items]), REVISION]
    key.append(digest({trial: actions.tolist() for trial, actions in recorded.items()}))
    worlds = {
        "lab": (lambda: make_lab(lab, batch), None),
        "world_model": (lambda: make_world_model(options.world_model.parent, batch, stage.seed, lab.horizon), weights),
    }
    for world, (make, model) in worlds.items():
        clients, recorders = {}, {}
        for name in CORRUPTIONS:
            actions = {item.episode: corrupt(name, recorded[item.trial.trial_id], item.trial) for item in items}
            clients[name] = Replay(name, actions)
            source = Source(name, world, get(lab.embodiment).control_hz, f"replay {REVISION}", model)
            table = options.out / world / name / "rollouts.parquet"
            recorders[name] = Recorder(table, source, digest([*key, name, world, model]))
        _record(make, clients, recorders, items, lab.horizon, world)


def _record(
    make: Callable[[], Any], clients: dict[str, Replay], recorders: dict[str, Recorder], items: list[Item],
    horizon: int, world: str,
) -> None:  # fmt: skip
    missing = {name: recorder.missing(items) for name, recorder in recorders.items()}
    with Progress(len(items) * len(clients) * horizon, f"replays in {world.replace('_', ' ')}") as progress:
        progress.skip(sum(len(items) - len(some) for some in missing.values()) * horizon)
        if any(missing.values()):
            env = make()
            try:
                for name, some in missing.items():
                    for finished in roll_out(env, clients[name], some, horizon, progress.update):
                        for rollout in finished:
                            recorders[name].write(rollout)
            finally:
                env.close()
    for recorder in recorders.values():
        recorder.finish(items)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.rollouts.corruptions",
        description="Replay successful actions, spoiled in known ways, in the lab and in the world model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, rollouts")
    parser.add_argument("--trials", type=Path, required=True, help="trials.json, or a folder of trials")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files of the lab")
    parser.add_argument("--world-model", type=Path, required=True, help="model.safetensors of the world model")
    parser.add_argument("--out", type=Path, required=True, help="folder for <world>/<corruption>/rollouts.parquet")
    options = parser.parse_args()
    die_with_parent()
    replay(load_stage(options.config), options)


if __name__ == "__main__":
    run_cli(main)
