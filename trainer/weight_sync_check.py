"""Check of an engine's weights by the log-probabilities of its own tokens, the only proof.

vLLM was observed to report a finished reload while using neither the old nor the new weights, and a stale cache from
old weights raises no error either. So after every sync the engine generates a short text, and the policy scores its
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import RunFailed
from ..models.engines.base import Completion, Engine, GenerationRequest, Prompt, Sampling
from ..models.engines.hf.model_adapter import PreparedPrompt
from .policy.batch import Group, pack
from .policy.decoder import DecoderPolicy

TOKENS = 32
HEAT = 1.5  # temperature: unlikely tokens distinguish weights better than those that any weights predict


@dataclass(frozen=True)
class WeightSyncCheck:
    """``policy``: without temperature, as in engines' log-probabilities. ``tolerance``: mean nats."""

    prompt: Prompt
    prepared: PreparedPrompt
    policy: DecoderPolicy
    tolerance: float

    async def check(self, engine: Engine, seed: int) -> float:
        """Mean difference of log-probabilities. Raises RunFailed above the tolerance."""
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
        known = self.policy(pack([group], self.policy.device)).logp.cpu().view(2, -1)
        return float((known - torch.tensor(written.logprobs)).abs().mean(dim=1).max())
