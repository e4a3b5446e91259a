"""What a job asks of a machine or a cluster: memory, time, processor cores, GPUs. None of it changes a result.

Estimates err on the large side, and a job that was ended for want of memory or time asks for more in its next attempt.
A profile's `set-resources` replaces any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workflow_src.common.sections import Config

if TYPE_CHECKING:
    from workflow_src.workflow import Workflow

DAY = 1440  # minutes; few partitions grant more, and a training that is stopped continues in its next attempt
CORES_PER_GPU = 4  # decoding and encoding beside the training itself
LAYER_SIZE = 36  # weights of a network's layer, at most, in squares of its width
COPIES = 4  # weights, their average and the optimiser's two moments, as a checkpoint holds them

Resource = Callable[..., int]


def growing(first: float, most: float = float("inf")) -> Resource:
    """A resource of which each attempt asks `first` more, up to `most`."""
    return lambda wildcards, attempt: int(min(first * attempt, most))


def minutes(steps: int) -> Resource:
    """`runtime` of a training: an hour to load and validate, and 1.2 s for each step, but a day at most."""
    return growing(60 + steps // 50, DAY)


def network_minutes(config: Config) -> Resource:
    """`runtime` of a policy network's training."""
    of = {name: minutes(network.training.steps) for name, network in config.behaviour_cloning.items()}
    return lambda wildcards, attempt: of[wildcards.network](wildcards, attempt)


def recording_memory(workers: int) -> Resource:
    """`mem_mb` of recording: a simulator for each worker."""
    return growing(2000 + 700 * workers)


def training_memory(config: Config) -> Resource:
    """`mem_mb` of the world model's training: what each process reads of a checkpoint, beside its own state."""
    network, ranks = config.world_model.network, config.gpus.world_model or config.world_model.processes
    weights = LAYER_SIZE * network.depth * network.width**2
    return growing(8000 + ranks * 2 * COPIES * 4 * weights / 1e6)


def gpus_of_policy(config: Config, policy: str) -> int:
    """GPUs of a policy's server and the rollouts that it serves, together."""
    asked = config.gpus.rollouts
    return asked.get(policy, 1) if isinstance(asked, dict) else asked


def server_gpus(flow: Workflow) -> Callable[[Any], int]:
    """`gpu` of a server: none of one that runs elsewhere.

    Its rollouts share them and ask for none: within a service's group resources are summed.
    """

    def asked(wildcards: Any) -> int:
        return flow.gpus(gpus_of_policy(flow.config, wildcards.policy)) if flow.served(wildcards.policy) else 0

    return asked


def rollout_gpus(flow: Workflow) -> Callable[[Any], int]:
    """`gpu` of rollouts: those of the world model alone where the policy's server runs elsewhere, else the server's."""

    def asked(wildcards: Any) -> int:
        if flow.served(wildcards.policy):
            return 0
        return flow.gpus(min(1, gpus_of_policy(flow.config, wildcards.policy)))

    return asked


def imagining_gpus(flow: Workflow) -> int:
    """`gpu` of jobs that use the world model without a policy: one where rollouts of any policy ask for some."""
    policies = flow.config.policies or [""]
    return flow.gpus(min(1, max(gpus_of_policy(flow.config, name) for name in policies)))


def server_memory(config: Config) -> Resource:
    """`mem_mb` of a server: large policies pass through the host's memory on their way to a GPU."""
    return lambda wildcards, attempt: attempt * (32000 if gpus_of_policy(config, wildcards.policy) else 4000)


def training_cores(config: Config) -> int:
    """`threads` of the world model's training: one per process on a CPU, several per GPU."""
    return CORES_PER_GPU * config.gpus.world_model or config.world_model.processes


def training_processes(config: Config) -> Callable[[Any, int], int]:
    """Processes of the world model's training where no GPU is granted: as configured, and no more than cores."""
    return lambda wildcards, threads: min(threads, config.world_model.processes)
