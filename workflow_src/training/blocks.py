"""What a training may do to a network's blocks from outside: recompute their activations, compile them.

Both replace a block's `forward` on the object alone: parameters keep their names, and copies made earlier stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Training


def blocks_of(model: nn.Module, option: str) -> list[nn.Module]:
    """The network's blocks. Raises UserError if it has none; `option` is the field that needs them."""
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise UserError(f"training.{option}: true, but {type(model).__name__} has no `blocks`; set it to false")
    return list(blocks)


def wrap_blocks(model: nn.Module, config: Training) -> None:
    """Do to the blocks what `config.compile` and `config.activation_checkpointing` ask for."""
    if config.compile:
        for block in blocks_of(model, "compile"):
            block.forward = torch.compile(block.forward, dynamic=False)
    if config.activation_checkpointing:
        for block in blocks_of(model, "activation_checkpointing"):
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return run
