"""Check of an engine's weights: the only proof is the log-probabilities that it gives its own tokens.

vLLM has been seen to report a finished reload and to answer with neither the old nor the new weights, and a cache that
was computed with old weights is as silent. So after every change the engine writes a short text, and the policy scores
its tokens.
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
HEAT = 1.5  # unlikely tokens tell weights apart better than those that any weights are sure of


@dataclass(frozen=True)
class WeightSyncCheck:
    """``policy``: without temperature or barred ids, as engines report log-probabilities. ``tolerance``: mean nats."""

    prompt: Prompt
    prepared: PreparedPrompt
    policy: DecoderPolicy
    tolerance: float

    async def check(self, engine: Engine, seed: int) -> float:
        """The mean difference of log-probabilities. Raises RunFailed where it is above the tolerance."""
        sampling = Sampling(HEAT, 1.0, TOKENS, seed)
        written = await engine.generate(GenerationRequest(self.prompt, sampling, logprobs=True))
        difference = self.difference(written)
        if not difference <= self.tolerance:  # NaN is none
            raise RunFailed(
                f"the rollout engine has other weights than the policy, or kept caches of older ones: "
                f"log-probabilities of a probe differ by {difference:.2g} on average, by at most {self.tolerance:.2g} "
                "where all is well (rollout.probe)"
            )
        return difference

    @torch.no_grad()
    def difference(self, written: Completion) -> float:
        """Mean absolute difference, in nats, of the engine's and the policy's log-probabilities of the same tokens.

        The text is packed behind itself, as captions of a group are, and the worse of the two counts: a layer that
        lets one leak into the next shows in the second alone.
        """
        assert written.logprobs is not None
        group = Group("probe", "probe", self.prepared, [written, written])
        known = self.policy(pack([group], self.policy.device)).logp.cpu().view(2, -1)
        return float((known - torch.tensor(written.logprobs)).abs().mean(dim=1).max())
