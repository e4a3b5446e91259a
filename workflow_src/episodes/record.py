"""Record the episodes of one split: actors act in the lab, everything is stored.

Works with any Gymnasium vector environment of this project's API that also offers `expert_actions`, `known_tasks` and
`instruction` (see `tabletop/env.py`). An episode depends on (seed, split, index) only, never on what was recorded
with it, so an interrupted recording continues and ends with the same bytes.
"""

from __future__ import annotations

import argparse
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import numpy as np

from workflow_src.common.config import check_name, load_stage, to_dict
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import Journal, digest, sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.common.sections import Lab, Split
from workflow_src.common.seeds import derive, rng
from workflow_src.embodiments import get as get_embodiment
from workflow_src.episodes.behaviours import BEHAVIOURS, decide
from workflow_src.episodes.store import JOURNAL, episode_paths, write_episode, write_table

RECIPE = 3  # raise when behaviours or the lab changed, so that half-recorded old episodes are not continued
BATCH = 40  # episodes simulated side by side


@dataclass(frozen=True)
class Plan:
    """What one episode is to be."""

    index: int
    task: str
    behaviour: str
    seed: int


def plan_episodes(split: Split, tasks: tuple[str, ...], seed: int, name: str) -> list[Plan]:
    """The split's episodes: behaviours in the exact shares of the mix, tasks evenly within each, in random order."""
    _check_split(split, name)
    names = [behaviour for behaviour, share in split.mix.items() if share > 0]
    shares = np.array([split.mix[behaviour] for behaviour in names], float)
    exact = split.episodes * shares / shares.sum()
    counts = np.floor(exact).astype(int)
    for position in np.argsort(counts - exact, kind="stable")[: split.episodes - counts.sum()]:
        counts[position] += 1
    behaviours = [name for name, count in zip(names, counts) for _ in range(count)]
    # Tasks go round over all behaviours: begun anew with each, the last task would be the rarest.
    kinds = [(behaviour, tasks[i % len(tasks)]) for i, behaviour in enumerate(behaviours)]
    order = rng(seed, "episodes", name, "order").permutation(len(kinds))
    return [Plan(i, kinds[k][1], kinds[k][0], derive(seed, "episodes", name, i)) for i, k in enumerate(order)]


def _check_split(split: Split, name: str) -> None:
    path = f"episodes.splits.{name}"
    if split.episodes < 1:
        raise UserError(f"{path}.episodes: {split.episodes} is not a positive number of episodes")
    for behaviour, share in split.mix.items():
        check_name(f"{path}.mix", behaviour, BEHAVIOURS)
        if share < 0:
            raise UserError(f"{path}.mix.{behaviour}: {share} is negative; give a share, 0 or more")
    if not sum(split.mix.values()) > 0:
        raise UserError(f"{path}.mix: no behaviour has a positive share; allowed: {', '.join(BEHAVIOURS)}")


def make_lab(lab: Lab, count: int) -> gymnasium.vector.VectorEnv:
    """The lab for recording. Raises `UserError` if it cannot serve as a teacher."""
    env = gymnasium.make_vec(
        lab.env_id, num_envs=count, scene=lab.scene, tasks=lab.tasks, image_size=lab.image_size,
        supersample=lab.supersample, horizon=lab.horizon, workers=lab.workers, expert=True,
    )  # fmt: skip
    for method in ("expert_actions", "known_tasks", "instruction"):
        if not hasattr(env.unwrapped, method):
            env.close()
            raise UserError(f"lab.env_id: {lab.env_id!r} has no {method}(); recording needs a lab with an expert")
    return env


def run_batch(env: gymnasium.vector.VectorEnv, plans: list[Plan], horizon: int) -> list[dict[str, np.ndarray]]:
    """Act `plans` out side by side, padded to the environment's size. Per episode its arrays and `frames`."""
    lab = env.unwrapped
    padded = plans + [plans[-1]] * (env.num_envs - len(plans))
    actors = [BEHAVIOURS[p.behaviour](p.task, lab.known_tasks(), rng(p.seed, "behaviour")) for p in padded]
    observation, info = env.reset(options={"trials": [{"task": p.task, "seed": p.seed} for p in padded]})
    seen = [(observation["image"], info)]
    commands = []
    for step in range(horizon):
        commands.append(decide(actors, step, info["state"], lab.expert_actions))
        observation, _, _, _, info = env.step(commands[-1])
        seen.append((observation["image"], info))
    frames = np.stack([image for image, _ in seen], 1)
    state = np.stack([info["state"] for _, info in seen], 1)
    expert = np.stack([info["expert"] for _, info in seen], 1)
    actions = np.stack(commands, 1)
    return [
        {"frames": frames[i], "actions": actions[i], "reached": _reached(state[i]), "expert": expert[i],
         "state": state[i], "success": info["success"][i]}
        for i in range(len(plans))
    ]  # fmt: skip


def _reached(state: np.ndarray) -> np.ndarray:
    """What the gripper did between the frames, as actions `(F-1, 7)`."""
    reached = np.zeros((len(state) - 1, 7), np.float32)
    reached[:, :3] = np.diff(state[:, :3], axis=0)
    reached[:, 6] = state[1:, 3]
    return reached


def record(lab: Lab, split: Split, name: str, seed: int, out: Path) -> None:
    """Record split `name` into the folder of `out`, then write the table `out`."""
    plans = plan_episodes(split, lab.tasks, seed, name)
    root = out.parent
    key = digest([RECIPE, seed, to_dict(replace(lab, workers=0)), to_dict(split), name])
    for left_behind in root.glob(".*.tmp.*"):  # by a recorder that was killed while writing
        left_behind.unlink()
    journal = Journal(root / JOURNAL, key)
    batches = {f"{start:09d}": plans[start : start + BATCH] for start in range(0, len(plans), BATCH)}
    missing = {item: batch for item, batch in batches.items() if not _intact(journal, item, root)}
    with Progress(len(plans), f"record {name}", "episode") as progress:
        progress.skip(len(plans) - sum(map(len, missing.values())))
        if missing:
            _record_batches(lab, missing, root, journal, progress)
    write_table(out, [row for item in batches for row in journal.done[item]["rows"]])


def _intact(journal: Journal, item: str, root: Path) -> bool:
    if item not in journal:
        return False
    for row in journal.done[item]["rows"]:
        for path, column in zip(episode_paths(root, row["index"]), ("sha256_video", "sha256_arrays")):
            if not path.is_file() or sha256_file(path) != row[column]:
                return False
    return True


def _record_batches(lab: Lab, batches: dict[str, list[Plan]], root: Path, journal: Journal, progress: Progress) -> None:
    """Simulate batch after batch; a thread writes each while the next is simulated."""
    env = make_lab(lab, min(BATCH, max(map(len, batches.values()))))
    pending: tuple[str, Future] | None = None

    def finish() -> None:
        if pending is not None:
            rows = pending[1].result()
            journal.record(pending[0], rows=rows)
            progress.update(len(rows))

    try:
        with ThreadPoolExecutor(1) as writer:
            for item, plans in batches.items():
                episodes = run_batch(env, plans, lab.horizon)
                instructions = [env.unwrapped.instruction(plan.task) for plan in plans]
                finish()
                pending = item, writer.submit(_write, lab, root, plans, instructions, episodes)
            finish()
    finally:
        env.close()


def _write(lab: Lab, root: Path, plans: list[Plan], instructions: list[str], episodes: list[dict]) -> list[dict]:
    control_hz = get_embodiment(lab.embodiment).control_hz
    rows = []
    for plan, instruction, episode in zip(plans, instructions, episodes):
        frames, success = episode.pop("frames"), bool(episode.pop("success"))
        rows.append({
            "index": plan.index, "frames": len(frames), "instruction": instruction, "task": plan.task,
            "behaviour": plan.behaviour, "control_hz": control_hz, "embodiment": lab.embodiment,
            "action_semantics": "commanded", "source": lab.env_id, "seed": plan.seed, "success": success,
            **write_episode(root, plan.index, frames, episode, control_hz),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record the episodes of one split in the lab. An interrupted recording continues.",
        epilog="example:\n  python -m workflow_src.episodes.record --config results/config/episodes.json \\\n"
        "      --split train --out results/episodes/tabletop/train/episodes.parquet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with sections lab and episodes")
    parser.add_argument("--split", required=True, help="name of a split in episodes.splits")
    parser.add_argument("--out", type=Path, required=True, help="the table, written last; episodes go beside it")
    arguments = parser.parse_args()
    die_with_parent()
    stage = load_stage(arguments.config)
    check_name("--split", arguments.split, stage.episodes.splits)
    record(stage.lab, stage.episodes.splits[arguments.split], arguments.split, stage.seed, arguments.out)


if __name__ == "__main__":
    run_cli(main)
