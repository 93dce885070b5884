"""Check of an engine's weights by the log-probabilities of its own tokens, the only proof.

vLLM was observed to report a finished reload while using neither the old nor the new weights, and a stale cache from
old weights raises no error either. So after every sync the engine generates a short text, and the policy in training
scores its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...errors import RunFailed
from ...models.engines.base import Completion, Engine, GenerationRequest, Prompt, Sampling
from ...models.engines.hf.model_adapter import PreparedPrompt
from ...models.engines.vllm.weight_sync import Precision
from ..policy.batch import Group, pack
from ..policy.decoder import DecoderPolicy

TOKENS = 32
HEAT = 1.5  # temperature: unlikely tokens distinguish weights better than those that any weights predict
EXACT, HALF, HALF_HEAD = 1e-3, 0.1, 0.2  # mean nats; in float32, 1e-6 was observed with correct weights


def tolerance(engine: Precision, policy: torch.dtype | None) -> float:
    """Largest mean difference, in nats, of two that have the same weights; ``policy``: its autocast type, if any.

    Half precision rounds the states of either side. A head in half precision also rounds the logits: those between 16
    and 32 in bfloat16 to multiples of 0.125.
    """
    if engine.head != "float32":
        return HALF_HEAD
    return EXACT if engine.weights == "float32" and policy is None else HALF


@dataclass(frozen=True)
class WeightSyncCheck:
    """``policy``: the one in training, sharded or not. ``tolerance``: mean nats."""

    prompt: Prompt
    prepared: PreparedPrompt
    policy: DecoderPolicy
    tolerance: float

    async def check(self, engine: Engine, seed: int) -> float:
        """Mean difference of log-probabilities. Raises RunFailed above the tolerance.

        A collective call if the policy is sharded; each process checks its own text.
        """
        sampling = Sampling(HEAT, 1.0, TOKENS, seed)
        written = await engine.generate(GenerationRequest(self.prompt, sampling, logprobs=True))
        difference = self.difference(written)
        if not difference <= self.tolerance:  # NaN fails, too
            raise RunFailed(
                f"the rollout engine has other weights than the policy, or kept caches of older ones: "
                f"log-probabilities of a probe differ by {difference:.2g} on average, by at most {self.tolerance:.2g} "
                "where all is well (rollout.probe)"
            )
        return difference

    @torch.no_grad()
    def difference(self, written: Completion) -> float:
        """Mean absolute difference, in nats, of the engine's and the policy's log-probabilities of the same tokens.

        The text is packed twice, like the captions of a group, and the worse copy counts: a layer that leaks from one
        caption into the next shows in the second copy only.
        """
        assert written.logprobs is not None
        group = Group("probe", "probe", self.prepared, [written, written])
        with _untempered(self.policy):
            known = self.policy(pack([group], self.policy.device)).logp.cpu().view(2, -1)
        return float((known - torch.tensor(written.logprobs)).abs().mean(dim=1).max())


@contextmanager
def _untempered(policy: DecoderPolicy) -> Iterator[None]:
    """At temperature 1, as in engines' log-probabilities, which are among the allowed ids, too.

    The policy itself is changed: if it is sharded, only its own forward pass gathers its weights.
    """
    temperature, policy.temperature = policy.temperature, 1.0
    try:
        yield
    finally:
        policy.temperature = temperature
