"""Fully sharded training (FSDP2): every process holds a part of each weight, gradient and optimiser state.

For models beyond one GPU. Checkpoints hold whole tensors whether a training is sharded or not, so each continues the
other. Only one block's weights are whole at a time; they are gathered in float32, because autocast chooses the number
format per operation as it does without sharding.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Training
from workflow_src.training.blocks import blocks_of
from workflow_src.training.distributed import Processes

# Sum and divide, where gloo is asked for a mean otherwise; that of torch 2.7 gives the sum instead.
SUM_FIRST = "set_force_sum_reduction_for_comms"


def check(config: Training, device: torch.device, prepares: bool) -> None:
    """Raise UserError for what a sharded training cannot do. `prepares`: it runs its average on every process."""
    from torch.distributed.fsdp import FSDPModule

    if device.type == "cpu" and not hasattr(FSDPModule, SUM_FIRST):
        raise UserError(
            f"training.shard: true, but torch {torch.__version__} cannot do it on CPUs; update torch, or set false"
        )
    if config.optimizer == "muon":
        raise UserError("training.optimizer: muon needs whole matrices, which training.shard: true splits; use adamw")
    if prepares:
        raise UserError(
            "training.shard: true, but this training runs its average between updates, which needs it whole "
            "(world_model.own_frames.share: set it to 0); or set training.shard: false"
        )


def shard(model: nn.Module, processes: Processes) -> None:
    """Split `model` over all processes, block by block, onto their devices; every process has the same values before.

    Its gradients will be means over processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for part in (*blocks_of(model, "shard"), model):
        fully_shard(part, mesh=mesh)
        if processes.device.type == "cpu":
            getattr(part, SUM_FIRST)(True)


def outline(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have no memory; its buffers are there."""
    hollow = copy.deepcopy(model)
    for module in hollow.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    return hollow


def fill(hollow: nn.Module, model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of what `outline` made, with the sharded `model`'s whole values on `device`. All processes take part."""
    whole_values = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    filled = copy.deepcopy(hollow)
    filled.load_state_dict(whole_values, strict=True, assign=True)
    return filled.to(device).eval()


def is_shard(tensor: Tensor) -> bool:
    """Whether it is this process's part of a split tensor."""
    # The module takes seconds to import and is there once something was split.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a shard the whole. All processes take part."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, sharing its memory."""
    return [tensor.to_local() if is_shard(tensor) else tensor for tensor in tensors]


def gather(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole values for a checkpoint: on rank 0; of shards, on the CPU. All processes take part."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if processes.first:  # one whole tensor on the device at a time
            gathered[name] = value.cpu() if is_shard(tensor) else value
    return gathered


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole `value` as `target` holds it: itself, or this process's shard."""
    if not is_shard(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def load(model: nn.Module, values: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole values, strictly, into a model that may be sharded. All processes take part."""
    state = model.state_dict()
    model.load_state_dict({name: like(value, state.get(name, value)) for name, value in values.items()}, strict=True)
