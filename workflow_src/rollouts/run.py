"""Roll one policy (one shard of its trials) out in the lab and in the world model."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_src.common.config import Stage, check_name, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import digest, sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress, say
from workflow_src.embodiments import get
from workflow_src.policies.client import PolicyClient, connect
from workflow_src.policies.foreign import DEAD_RECKONED, refusals, translator_of
from workflow_src.rollouts.loop import Item, roll_out
from workflow_src.rollouts.records import Recorder, Source
from workflow_src.rollouts.trials import Trial, load_trials
from workflow_src.rollouts.worlds import make_lab, make_world_model

EXAMPLES = """examples:
  python -m workflow_src.rollouts.run --config results/config/policies/bc.json --policy bc --shard 0 \\
      --endpoint results/endpoints/bc/0.json --trials results/trials/trials.json \\
      --world-model results/world_model/model.safetensors \\
      --lab-out results/rollouts/lab/bc/shard_0/rollouts.parquet \\
      --world-model-out results/rollouts/world_model/bc/shard_0/rollouts.parquet
"""


def shard_of(trials: list[Trial], repeats: int, shard: int, shards: int) -> list[Item]:
    """Trials `shard::shards`, each `repeats` times."""
    return [Item(trial, repeat) for trial in trials[shard::shards] for repeat in range(repeats)]


def trials_digest(trials: list[Trial]) -> str:
    """Identifies the content of the trials that rollouts depend on."""
    return digest(
        [
            (t.trial_id, t.task, t.instruction, t.seed, t.initial_state, hashlib.sha256(t.image.tobytes()).hexdigest())
            for t in trials
        ]
    )


def model_digest(weights: Path) -> str:
    """Identifies a world-model artefact: its weights and what `config.json` says about how to run them."""
    config = weights.parent / "config.json"
    for path in (weights, config):
        if not path.is_file():
            raise UserError(f"{path}: no such file; it is part of the world-model artefact")
    # Provenance in the configuration (time, commit) does not change a rollout.
    said = {key: value for key, value in json.loads(config.read_text("utf-8")).items() if key != "provenance"}
    return digest([sha256_file(weights), said])


def record_world(
    make: Callable[[], Any], client: PolicyClient, items: list[Item], horizon: int, recorder: Recorder
) -> None:
    """Do the rollouts of `items` that are missing in the world that `make` makes, and finish the record."""
    missing = recorder.missing(items)
    label = f"{recorder.source.policy} in {recorder.source.world.replace('_', ' ')}"
    with Progress(len(items) * horizon, label) as progress:
        progress.skip((len(items) - len(missing)) * horizon)
        if missing:
            env = make()
            try:
                for finished in roll_out(env, client, missing, horizon, progress.update):
                    for rollout in finished:
                        recorder.write(rollout)
            finally:
                env.close()
    recorder.finish(items)


def run(stage: Stage, options: argparse.Namespace, client: PolicyClient) -> None:
    """Both worlds, one after the other, with one policy connection."""
    trials, rollouts, lab = load_trials(options.trials), stage.rollouts, stage.lab
    items = shard_of(trials, rollouts.repeats, options.shard, options.shards)
    real = [item for item in items if item.trial.initial_state is not None and lab.scene != "none"]
    if len(real) < len(items) and lab.scene != "none":
        say(f"{len(items) - len(real)} trial(s) have no initial_state: not rolled out in the lab")
    needs_pose = client.metadata.extra.get("needs_pose")
    states = [(trial.trial_id, trial.initial_state) for trial in trials]
    if refused := refusals(stage.policies[options.policy].foreign, states, needs_pose):
        raise UserError(f"policy {options.policy}: {'; '.join(refused)}")
    reckoned = DEAD_RECKONED if needs_pose else None
    hz, served, weights = get(lab.embodiment).control_hz, client.metadata_digest, model_digest(options.world_model)
    # A rollout depends on its own trial; the digest covers all, so a changed set of trials starts afresh.
    key = [stage.digest, served, trials_digest(trials)]
    record_world(
        lambda: make_lab(lab, rollouts.batch), client, real, lab.horizon,
        Recorder(options.lab_out, Source(options.policy, "lab", hz, served, None, reckoned), digest([*key, "lab"])),
    )  # fmt: skip
    source = Source(options.policy, "world_model", hz, served, weights, reckoned)
    record_world(
        lambda: make_world_model(options.world_model.parent, rollouts.batch, stage.seed, lab.horizon),
        client, items, lab.horizon, Recorder(options.world_model_out, source, digest([*key, weights])),
    )  # fmt: skip


def use_devices(devices: list[str]) -> None:
    """Work on the last accelerator that the policy's server was granted. Call before torch is imported.

    Of several, the server leaves that one to the world model (`lifecycle.Endpoint.grant`).
    """
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[-1]


def arguments() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.rollouts.run",
        description=__doc__.strip(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, policies, rollouts")
    parser.add_argument("--policy", required=True, help="name of the policy in the configuration")
    parser.add_argument("--shard", type=int, default=0, help="which shard of the trials, from 0")
    parser.add_argument("--shards", type=int, default=1, help="number of shards; changes no rollout")
    parser.add_argument("--endpoint", required=True, help="endpoint file of a policy server, or ws://host:port")
    parser.add_argument("--trials", type=Path, required=True, help="trials.json, or a folder of trials")
    parser.add_argument("--world-model", type=Path, required=True, help="model.safetensors of the world model")
    parser.add_argument("--lab-out", type=Path, required=True, help="rollouts.parquet of the lab")
    parser.add_argument("--world-model-out", type=Path, required=True, help="rollouts.parquet of the world model")
    parser.add_argument("--server-deadline", type=float, help="seconds the policy server may take to load")
    parser.add_argument("--step-timeout", type=float, help="seconds the policy may take for one answer")
    options = parser.parse_args()
    if not 0 <= options.shard < options.shards:
        raise UserError(f"--shard: {options.shard} is not one of 0…{options.shards - 1} (--shards {options.shards})")
    return options


def main() -> None:
    """Entry point."""
    options = arguments()
    die_with_parent()
    stage = load_stage(options.config)
    check_name("--policy", options.policy, stage.policies)
    policy, rollouts = stage.policies[options.policy], stage.rollouts
    if policy.token_env and policy.token_env not in os.environ:
        raise UserError(f"policies.{options.policy}.token_env: environment variable {policy.token_env} is not set")
    with connect(
        options.endpoint,
        options.server_deadline or rollouts.server_deadline,
        os.environ.get(policy.token_env) if policy.token_env else None,
        policy=options.policy,
        step_timeout=options.step_timeout or rollouts.step_timeout,
        allow_plaintext=policy.allow_plaintext,
        translator=translator_of(policy),
    ) as client:
        use_devices(client.devices)
        run(stage, options, client)


if __name__ == "__main__":
    run_cli(main)
