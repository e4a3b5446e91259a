"""The two worlds a policy is rolled out in, made by Gymnasium id: the lab, and the learned model of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Lab

WORLD_MODEL = "workflow_src.world_model.environment:WorldModel-v0"


def make_lab(lab: Lab, num_envs: int) -> Any:
    """The configured lab as a `VectorEnv` of `num_envs` places (DESIGN §3, environment API)."""
    return _make(
        lab.env_id, num_envs, scene=lab.scene, tasks=lab.tasks, image_size=lab.image_size, supersample=lab.supersample,
        horizon=lab.horizon, workers=lab.workers,
    )  # fmt: skip


def make_world_model(folder: str | Path, num_envs: int, seed: int, horizon: int) -> Any:
    """The world model in `folder` as a `VectorEnv` of `num_envs` places, for `horizon` steps."""
    return _make(WORLD_MODEL, num_envs, model=str(folder), seed=seed, horizon=horizon)


def _make(env_id: str, num_envs: int, **options: Any) -> Any:
    import gymnasium

    try:
        return gymnasium.make_vec(env_id, num_envs=num_envs, **options)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(f"environment {env_id!r} cannot be made: {' '.join(str(error).split())}") from error
