"""Policy of encoder-decoders (ViT-GPT2, BLIP): a group's captions are packed into one row, as in :mod:`.decoder`.

Cross-attention to the image needs no tree, since every token of a group attends to the same states: their keys and
values are computed once per group, not once per caption. :func:`reference_logps` is the slow reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.engines.hf.captioner_adapter import is_blip, language_model
from ...models.engines.hf.model_adapter import PreparedPrompt
from .batch import Batch
from .captioner import CaptionerPolicy, whole_logps
from .tree_attention import Tree, dense_mask


class EncoderDecoderPolicy(CaptionerPolicy):
    """An encoder-decoder whose forward pass scores the completions of packed groups.

    See :class:`.decoder.DecoderPolicy`.
    """

    def attend(self, implementation: str) -> None:
        if not is_blip(self.model):  # BLIP has its own attention code, which only takes masks
            super().attend(implementation)

    def hidden(self, batch: Batch) -> Tensor:
        out = self.base(
            inputs_embeds=self.base.get_input_embeddings()(batch.ids),  # given ids, GPT-2 would warn about padding
            position_ids=batch.positions[0],
            encoder_hidden_states=self.look(batch.prompts),
            use_cache=False,
            **self._beside(batch.tree),
        )
        states: Tensor = out.last_hidden_state
        return states

    def _beside(self, tree: Tree) -> dict[str, Any]:
        """Attention pattern of the packed row, as the decoder's arguments."""
        if not is_blip(self.model):
            return {"tree": tree}
        sees, like = dense_mask(tree), language_model(self.model).get_input_embeddings().weight
        mask = torch.zeros(sees.shape, dtype=like.dtype, device=like.device).masked_fill(~sees, _LEAST)
        return {"attention_mask": mask, "is_decoder": True}

    def before_head(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        lm = language_model(self.model)
        if not is_blip(self.model):
            return hidden.to(lm.lm_head.weight.dtype), lm.lm_head.weight, None
        head = lm.cls.predictions
        return head.transform(hidden.to(head.decoder.weight.dtype)), head.decoder.weight, head.decoder.bias


_LEAST = torch.finfo(torch.float32).min / 2  # added to the scores of masked positions: their weights become 0


def reference_logps(policy: EncoderDecoderPolicy, prompt: PreparedPrompt, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities (tokens,) of one completion, from the whole sequence and all its logits."""
    return whole_logps(policy, prompt, tokens, "input_ids" if is_blip(policy.model) else "decoder_input_ids")
