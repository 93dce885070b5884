"""RMS normalisation with its gradient written out: a third of the passes over memory of automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EXACT = (torch.float32, torch.float64)


class _RMSNorm(torch.autograd.Function):
    """y = w x / r with r = sqrt(mean(x²) + eps) (arXiv 1910.07467 eq. 4); dx = (w g - x mean(w g x) / r²) / r."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse(hidden, eps)
        ctx.save_for_backward(hidden, weight, inverse)
        out: Tensor = (hidden * inverse).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse = ctx.saved_tensors
        grad, width = grads[0], hidden.shape[-1]
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.mv((grad * hidden).reshape(-1, width).T, inverse.flatten())
        spread = grad * weight
        flat, seen = spread.reshape(-1, 1, width), hidden.reshape(-1, width, 1)
        along = torch.bmm(flat, seen).view(inverse.shape).mul_(inverse**3).div_(-width)
        return spread.mul_(inverse).addcmul_(hidden, along), of_weight, None


def _inverse(hidden: Tensor, eps: float) -> Tensor:
    """1 / r of each column, (..., 1); it reads the states once, where torch's rms_norm squares a copy of them."""
    inverse: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return inverse.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()


class FusedNorm:
    """A module's forward pass, computed by :class:`_RMSNorm`; by ``plain``, its own, in half precision."""

    def __init__(self, norm: Any, plain: Callable[[Tensor], Tensor], eps: float) -> None:
        self._norm, self._plain, self._eps = norm, plain, eps

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self._norm.weight.dtype or hidden_states.dtype not in EXACT:
            return self._plain(hidden_states)
        if not torch.is_grad_enabled():  # while sampling
            return (hidden_states * _inverse(hidden_states, self._eps)).mul_(self._norm.weight)
        out: Tensor = _RMSNorm.apply(hidden_states, self._norm.weight, self._eps)
        return out


def fuse_norms(model: nn.Module) -> int:
    """Compute the model's RMS norms so; returns their number. A norm that computes something else is left alone."""
    fused = 0
    for norm in model.modules():
        eps, weight = getattr(norm, "variance_epsilon", None), getattr(norm, "weight", None)
        if type(norm).__name__.endswith("RMSNorm") and isinstance(eps, float) and _is_plain(norm, weight, eps):
            norm.forward = FusedNorm(norm, norm.forward, eps)  # type: ignore[method-assign]
            fused += 1
    return fused


@torch.no_grad()
def _is_plain(norm: nn.Module, weight: Any, eps: float) -> bool:
    """Whether the module computes what :class:`_RMSNorm` does, and is not fused yet."""
    if not isinstance(weight, Tensor) or weight.dtype not in EXACT or isinstance(norm.forward, FusedNorm):
        return False
    trial = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
    expected, found = norm(trial), _RMSNorm.apply(trial, weight, eps)
    return bool(torch.allclose(expected, found, rtol=1e-5, atol=1e-6))
