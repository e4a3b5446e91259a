"""The elementwise halves of a block, with backward passes written for a CPU.

On a CPU a small transformer spends its time moving memory, not multiplying. Under bfloat16 autocast, automatic
differentiation of these formulas converts and copies every operand again; written by hand the backward passes touch
each tensor once. On a GPU, where a compiler fuses the plain formulas, and without gradients, the plain formulas run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # of the layer norm


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_grad_enabled()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of `x (B, T, N, D)` without gain, scaled and shifted per frame by `scale`, `shift (B, T, 1, D)`.

    Normalised in float32; the output has the dtype of `shift`, in which the matrices work.
    """
    if _by_hand(x):
        return _Modulate.apply(x, shift, scale)
    normal = F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON).to(shift.dtype)
    return torch.addcmul(shift, normal, 1 + scale)


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`x + gate * y` in x's dtype: `x`, `y (B, T, N, D)`, `gate (B, T, 1, D)`."""
    return _GatedAdd.apply(x, gate, y) if _by_hand(x) else torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


class SquaredReLU(nn.Module):
    """`max(x, 0)**2` (Primer, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return _SquaredReLU.apply(x) if _by_hand(x) else F.relu(x).square()


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of `queries (B, G, H, L, E)` to `keys`, `values (B, G, H, S, E)`; `bias`
    float32 ([H,] L, S).
    """
    shape = queries.shape
    queries, keys, values = (part.reshape(-1, *part.shape[3:]) for part in (queries, keys, values))
    groups = shape[0] * shape[1]
    if _by_hand(queries):
        return _Attention.apply(queries, keys, values, bias, groups).view(shape)
    return torch.bmm(_weights(queries, keys, bias, groups), values).view(shape)


def _weights(queries: Tensor, keys: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Attention weights (B * G * H, L, S), from a float32 softmax: in bfloat16 a CPU is three times slower at it."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(queries.shape[-1] ** -0.5)
    if bias is not None:
        scores.view(groups, -1, *scores.shape[1:]).add_(bias)
    return scores.softmax(-1).to(queries.dtype)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPSILON)
        normal, gain = normal.to(shift.dtype), 1 + scale
        ctx.save_for_backward(x, mean, rstd, normal, gain)
        return torch.addcmul(shift, normal, gain)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, rstd, normal, gain = ctx.saved_tensors
        towards_x = (grad * gain).to(x.dtype)
        mask = [True, False, False]
        dx = torch.ops.aten.native_layer_norm_backward(towards_x, x, x.shape[-1:], mean, rstd, None, None, mask)[0]
        return dx, grad.sum(2, keepdim=True), (grad * normal).sum(2, keepdim=True)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return x + gate * y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        low = grad.to(y.dtype)
        return grad, (low * y).sum(2, keepdim=True), low * gate


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        weights = _weights(queries, keys, bias, groups)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.groups, ctx.bias_shape = groups, None if bias is None else bias.shape
        return torch.bmm(weights, values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights = ctx.saved_tensors
        towards_weights = torch.bmm(grad, values.transpose(1, 2))
        towards_scores = torch.ops.aten._softmax_backward_data(towards_weights, weights, -1, weights.dtype)
        scale = queries.shape[-1] ** -0.5
        towards_queries = torch.bmm(towards_scores, keys).mul_(scale)
        towards_keys = torch.bmm(towards_scores.transpose(1, 2), queries).mul_(scale)
        towards_bias = None
        if ctx.needs_input_grad[3]:
            by_group = towards_scores.view(ctx.groups, -1, *towards_scores.shape[1:])
            towards_bias = by_group.sum(0, dtype=torch.float32).sum_to_size(ctx.bias_shape)
        return towards_queries, towards_keys, torch.bmm(weights.transpose(1, 2), grad), towards_bias, None
