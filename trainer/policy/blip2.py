"""Policy of BLIP-2 with OPT (as in VLRM): a causal decoder, with the Q-Former's image embeddings before the text.

Image, prompt and head are computed once each, as in :mod:`.decoder`. :func:`reference_logps` is the slow reference.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...models.engines.hf.captioner_adapter import put_in
from ...models.engines.hf.model_adapter import PreparedPrompt
from .batch import Batch
from .captioner import CaptionerPolicy, whole_logps
from .packing.attention import no_mask


class Blip2Policy(CaptionerPolicy):
    """BLIP-2 whose forward pass scores the completions of packed groups; see :class:`.decoder.DecoderPolicy`."""

    def hidden(self, batch: Batch) -> Tensor:
        model = self.model
        embedded = model.get_input_embeddings()(batch.ids)
        seen = self.look(batch.prompts).flatten(0, 1)
        out = self.base(
            inputs_embeds=put_in(embedded, batch.ids == model.config.image_token_id, seen),
            position_ids=batch.positions[0],
            attention_mask=no_mask(batch.ids.device),
            use_cache=False,
            tree=batch.tree,
        )
        states: Tensor = out.last_hidden_state
        return states

    def before_head(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        weight: Tensor = self.model.language_model.lm_head.weight
        return hidden.to(weight.dtype), weight, None


def reference_logps(policy: Blip2Policy, prompt: PreparedPrompt, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities (tokens,) of one completion, from the whole sequence and all its logits."""
    return whole_logps(policy, prompt, tokens, "input_ids")
