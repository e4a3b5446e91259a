"""The action beside every frame: read from a store, composed over skipped frames, aligned, and in world-model units."""

from __future__ import annotations

import numpy as np

from workflow_src import embodiments
from workflow_src.common.errors import UserError
from workflow_src.episodes.store import EpisodeStore, episode_paths

GRIPPER = 6  # of a metric action: the only entry that is a position, all others are displacements
WORLDGYM = (
    "worldgym"  # action semantics of WorldGym's files: commanded, in world-model units, one for the last frame too
)


def metric_actions(
    store: EpisodeStore, i: int, arrays: dict[str, np.ndarray], frames: int, kind: str = "commanded"
) -> np.ndarray:
    """What led from frame to frame of episode `i`, which has `arrays` and `frames` frames: metric, float32 (frames-1, 7).

    Or (frames-1, 10) with base. `kind`: `commanded` or `reached`. Raises UserError naming the file for a wrong number of
    actions, a wrong width, or numbers that are not finite.
    """
    path = episode_paths(store.root, int(store.table["index"].iloc[i]))[1]
    name = "reached" if kind == "reached" else "actions"
    if name not in arrays:
        raise UserError(f"world_model.actions: {kind!r} is not in {path}; choose commanded" if kind == "reached" else
                        f"{path}: holds no actions; record or convert it again")  # fmt: skip
    actions, published = arrays[name], store.table["action_semantics"].iloc[i] == WORLDGYM
    count = (frames - 1, frames) if published else (frames - 1,)
    widths = (embodiments.WORLD_MODEL_DIM,) if published else (embodiments.METRIC_DIM, embodiments.METRIC_DIM + 3)
    if actions.ndim != 2 or len(actions) not in count or actions.shape[1] not in widths:
        raise UserError(f"{path}: {name} of shape {actions.shape} beside {frames} frames, not "
                        f"({frames - 1}, {' or '.join(map(str, widths))}); convert it again")  # fmt: skip
    if not np.isfinite(actions).all():
        step = int((~np.isfinite(actions)).any(1).argmax())
        raise UserError(f"{path}: {name}[{step}] is not finite; mend it, or delete the episode and convert again")
    if published:
        return embodiments.from_world_model(actions[: frames - 1], str(store.table["embodiment"].iloc[i]), WORLDGYM)
    return actions


def compose(actions: np.ndarray, steps: int) -> np.ndarray:
    """Row t: what the metric actions t-`steps`+1 to t, or as many of them as there are, do together; same shape, type.

    Displacements add up, in metres and radians; the gripper ends where the last action puts it. Adding rotations is right
    to first order in their angles: two turns of 0.25 rad about different axes, the largest there are, are off by 0.03 rad.
    WorldGym's loader takes every n-th action as it is, so its models see a fraction of the motion that the frames show.
    """
    total = actions.astype(np.float64)
    for back in range(1, steps):
        total[back:] += actions[:-back]
    total[:, GRIPPER] = actions[:, GRIPPER]
    return total.astype(actions.dtype)


def compose_ahead(actions: np.ndarray, steps: int) -> np.ndarray:
    """Row t: what the metric actions t to t+`steps`-1, or as many of them as there are, do together; same shape, type."""
    still = np.repeat(actions[-1:], steps - 1, axis=0)
    still[:, :GRIPPER] = still[:, GRIPPER + 1 :] = 0
    return compose(np.concatenate([actions, still]), steps)[len(still) :]


def beside_frames(
    actions: np.ndarray, *, embodiment: str, convention: str, alignment: str, skip: int = 1
) -> np.ndarray:
    """The action beside every frame, where clips show every `skip`-th: metric (F-1, A) -> world-model units (F, 10).

    `leads_to`: frame t stands beside what led there from frame t-`skip`, or from frame 0; frame 0 beside zeros ("episode
    start"). `worldgym_train`: frame t stands beside what leads on to frame t+`skip`, or to the last; the last beside zeros.
    """
    if alignment not in ("leads_to", "worldgym_train"):
        raise UserError(f"world_model.alignment: {alignment!r} is not one of leads_to, worldgym_train")
    before = alignment == "leads_to"
    composed = (compose if before else compose_ahead)(actions, skip)
    converted = embodiments.to_world_model(composed, embodiment, convention, steps=skip)
    return np.pad(converted, ((1, 0) if before else (0, 1), (0, 0)))
