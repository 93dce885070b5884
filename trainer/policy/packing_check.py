"""Check that a model supports packing: packed captions must get the same log-probabilities as single ones.

The tree of :mod:`.packing.attention` implements full causal attention only, :mod:`.packing.recurrent` the gated delta
layers of Qwen3.5. Sliding windows, other recurrent states, attention sinks or capped scores would be ignored, or would
leak one caption into the next, and training would continue with wrong log-probabilities. So such models are refused by
their configuration, and the others are tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ...models.engines.base import Completion
from ...models.engines.hf.captioner_adapter import language_model
from ...models.engines.hf.model_adapter import HYBRIDS, PreparedPrompt
from . import blip2, decoder, encoder_decoder
from .batch import Group, pack
from .blip2 import Blip2Policy
from .decoder import DecoderPolicy
from .encoder_decoder import EncoderDecoderPolicy

FULL, RECURRENT = "full_attention", "linear_attention"
COMPLETIONS, TOKENS = 3, 12
EXACT, AUTOCAST = 1e-3, 0.1  # nats: limit on the largest difference in float32, and on the mean under autocast


def unknown_layers(model: Any) -> str | None:
    """Feature of a loaded model's text decoder that packing does not support, in words; None without any."""
    lm = language_model(model)
    config = lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    known = {FULL, RECURRENT} if getattr(config, "model_type", None) in HYBRIDS else {FULL}
    if kinds is not None and (other := sorted({*kinds} - known)):
        return f"layers of {' and '.join(other)}"
    if kinds is None and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "attention within a sliding window"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            return f"capped scores ({name})"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "ALiBi positions"
    if any(name.rsplit(".", 1)[-1] in ("sinks", "attention_sink_bias") for name, _ in lm.named_parameters()):
        return "attention sinks"
    return None


def refuse_unknown_layers(model: Any, called: str) -> None:
    """Raise BadInput for a model whose captions cannot be packed."""
    if (layers := unknown_layers(model)) is not None:
        raise BadInput(
            f"{called}: {type(model).__name__} has {layers}, which the trainer's packing of captions does not know; "
            "train a model with full attention in all layers (Qwen2.5-VL, Qwen3-VL, BLIP, BLIP-2 with OPT, ViT-GPT2) "
            "or Qwen3.5"
        )


@dataclass(frozen=True)
class PackingCheck:
    """Differences of packed and plain log-probabilities, in nats: largest of the first and the last caption, mean."""

    first: float
    last: float
    mean: float
    autocast: bool

    @property
    def holds(self) -> bool:
        """Whether the differences are within the limits; False for NaN."""
        return self.mean <= AUTOCAST if self.autocast else self.first <= EXACT and self.last <= EXACT

    def line(self) -> str:
        return f"preflight: packed captions differ from plain ones by {max(self.first, self.last):.2g} nats at most"


@torch.no_grad()
def check_packing(policy: DecoderPolicy, prompt: PreparedPrompt, called: str) -> PackingCheck:
    """Score random captions packed and one at a time; leaks from the other captions show in the last one.

    In float32, since a wrong layer may differ by as little as 0.015 nats, which half precision hides; then, if the
    policy computes in half precision, in that, since other kernels are used. Returns the first; call it while weights
    are in float32 and not split. Raises BadInput if they differ.
    """
    with in_float32(policy):
        check = _compare(policy, prompt, called)
    if policy.dtype is not None:
        _compare(policy, prompt, called)
    return check


@contextmanager
def in_float32(policy: DecoderPolicy) -> Iterator[None]:
    """Without autocast."""
    dtype, policy.dtype = policy.dtype, None
    try:
        yield
    finally:
        policy.dtype = dtype


def _compare(policy: DecoderPolicy, prompt: PreparedPrompt, called: str) -> PackingCheck:
    completions = random_completions(policy)
    packed = policy(pack([Group("packing", "packing", prompt, completions)], policy.device)).logp.split(TOKENS)
    gaps = [
        (packed[at] - plain_logps(policy, prompt, completions[at])).abs().float().cpu() for at in (0, COMPLETIONS - 1)
    ]
    first, last = (float(gap.max()) for gap in gaps)
    check = PackingCheck(first, last, float(torch.cat(gaps).mean()), policy.dtype is not None)
    if not check.holds:
        raise BadInput(
            f"{called}: {type(policy.model).__name__} gives packed captions other log-probabilities than single ones "
            f"(by {first:.2g} nats the first, {last:.2g} the last of {COMPLETIONS}), so training it here would be wrong"
        )
    return check


def random_completions(policy: DecoderPolicy, seed: int = 0) -> list[Completion]:
    """Captions of random allowed tokens."""
    vocabulary = len(language_model(policy.model).get_output_embeddings().weight)
    banned = set(policy.get_buffer("banned").tolist())
    allowed = [token for token in range(vocabulary) if token not in banned]
    rng = Random(seed)
    sequences = [tuple(rng.choice(allowed) for _ in range(TOKENS)) for _ in range(COMPLETIONS)]
    return [Completion("", tokens, "stop", TOKENS) for tokens in sequences]


def plain_logps(policy: DecoderPolicy, prompt: PreparedPrompt, completion: Completion) -> Tensor:
    """Log-probabilities (tokens,) of one completion from the model's own forward pass, in the policy's precision."""
    with torch.autocast(policy.device.type, policy.dtype) if policy.dtype is not None else nullcontext():
        if isinstance(policy, Blip2Policy):
            return blip2.reference_logps(policy, prompt, completion.token_ids)
        if isinstance(policy, EncoderDecoderPolicy):
            return encoder_decoder.reference_logps(policy, prompt, completion.token_ids)
        return decoder.reference_logps(policy, prompt, completion.token_ids)
