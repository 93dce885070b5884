"""Optimizer and learning rate of a policy."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from .decoder import DecoderPolicy


class OptimizerSettings(Protocol):
    """The part of a recipe that this file needs; see :class:`..recipe.OptimizerConfig`."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...


def build_optimizer(policy: DecoderPolicy, config: OptimizerSettings, head_rate: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over the trainable weights, with weight decay on matrices only.

    ``scale`` of a parameter group: factor on :func:`rate`; ``head_rate``: that of the value head.
    """
    head = {id(weight) for weight in (policy.value_head.parameters() if policy.value_head else ())}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in policy.parameters():
        if weight.requires_grad:
            decay = config.weight_decay if weight.ndim >= 2 else 0.0
            groups.setdefault((decay, head_rate if id(weight) in head else 1.0), []).append(weight)
    described = [
        {"params": weights, "weight_decay": decay, "scale": scale} for (decay, scale), weights in groups.items()
    ]
    # On a CPU the step of each weight is a dozen small operations unless they are fused.
    on_cpu = not any(hasattr(weight, "full_tensor") or weight.device.type != "cpu" for weight in policy.parameters())
    return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, fused=on_cpu or None)


def rate(config: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of ``step``, counted from 0."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = 1 - min(1.0, max(0, step - config.warmup) / max(1, steps - config.warmup))
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]
    return config.lr * warm * shape
