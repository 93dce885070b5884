"""Policy of encoder-decoders (ViT-GPT2, BLIP): a group's captions are packed into one row, as in :mod:`.decoder`.

Cross-attention needs no tree, since every token of a group attends to the states of the same image: their keys and
values are computed once per group, not once per caption. :func:`reference_logps` is the slow reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.engines.hf.captioner_adapter import is_blip, language_model
from ...models.engines.hf.model_adapter import PreparedPrompt
from .batch import Batch
from .captioner import CaptionerPolicy, whole_logps
from .packing.attention import image_columns, no_mask
from .packing.tree import Tree, dense_mask


class EncoderDecoderPolicy(CaptionerPolicy):
    """An encoder-decoder whose forward pass scores the completions of packed groups.

    See :class:`.decoder.DecoderPolicy`.
    """

    def attend(self, implementation: str) -> None:
        if not is_blip(self.model):  # BLIP has its own attention code, which only takes masks
            super().attend(implementation)

    def hidden(self, batch: Batch) -> Tensor:
        assert isinstance(batch.tree, Tree)
        seen = self.look(batch.prompts)
        embedded = self.base.get_input_embeddings()(batch.ids)  # given ids, GPT-2 would warn about padding
        if is_blip(self.model):
            return self._by_group(embedded, batch, seen)
        out = self.base(
            inputs_embeds=embedded,
            position_ids=batch.positions[0],
            attention_mask=no_mask(embedded.device),
            encoder_hidden_states=seen.flatten(0, 1)[None],
            encoder_attention_mask=image_columns(batch.tree, embedded.device),
            use_cache=False,
            tree=batch.tree,
        )
        states: Tensor = out.last_hidden_state
        return states

    def _by_group(self, embedded: Tensor, batch: Batch, seen: Tensor) -> Tensor:
        """Hidden states of BLIP's decoder, whose own attention code only takes masks: one forward pass per group."""
        assert isinstance(batch.tree, Tree)
        states: list[Tensor] = []
        for span, image in zip(batch.tree.spans, seen.split(1), strict=True):
            own = slice(span.start, span.end)
            sees = dense_mask(span).to(embedded.device)[None, None]
            out = self.base(
                inputs_embeds=embedded[:, own].clone(),  # BLIP adds positions in place
                position_ids=batch.positions[0, :, own],
                encoder_hidden_states=image,
                attention_mask=torch.zeros_like(sees, dtype=embedded.dtype).masked_fill(~sees, _LEAST),
                is_decoder=True,
                use_cache=False,
            )
            states.append(out.last_hidden_state)
        return torch.cat(states, dim=1)

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
