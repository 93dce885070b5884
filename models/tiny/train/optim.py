"""Muon for the hidden matrices, AdamW for the other parameters.

Muon updates a matrix along its orthogonalised momentum, which trains small transformers in fewer steps. Torch's own
implementation computes in bfloat16, slow on CPUs without bfloat16 instructions; this one keeps the weights' dtype and
processes all matrices of one shape in a batch.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MATCH_ADAM = 0.2  # scales orthogonal updates to the usual size of AdamW's, so that both share a learning rate


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps; every parameter must be a matrix."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                scale = group["lr"] * MATCH_ADAM * max(shape) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the running gradient."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> the same shape, singular values pushed near one (quintic Newton-Schulz iteration)."""
    tall = matrices.size(-2) > matrices.size(-1)
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def build_optimizers(model: nn.Module, lr: float, adam_lr: float, *others: nn.Parameter) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside a model; AdamW on its embeddings, norms, biases and filters, and on ``others``."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inside = [p for name, p in trained.items() if p.ndim == 2 and "embed" not in name and id(p) not in tables]
    chosen = {id(p) for p in inside}
    rest = [p for p in trained.values() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(inside, lr=lr, weight_decay=0.05),
        torch.optim.AdamW([*rest, *others], lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["top_lr"] = group["lr"]
    return optimizers


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Multiply the learning rates passed to :func:`build_optimizers` by ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = group["top_lr"] * rate
