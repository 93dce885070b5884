"""The policy of decoder VLMs (Qwen2.5-VL, Qwen3-VL): log-probabilities of completions by the fast path.

The vision tower sees each image once, the decoder each prompt once with gradients, the head nothing but what foretells
completion tokens. :func:`reference_logps` is the slow twin: a caption at a time, nothing shared, transformers' own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...models.engines.hf.model_adapter import PreparedImage, PreparedPrompt
from .batch import Batch
from .critic import ValueHead
from .token_logprobs import token_scores
from .tree_attention import NAME


class Scores(NamedTuple):
    """Of each completion token, float32 (tokens,): log-probability, entropy, and the value head's expectation.

    A tuple, since FSDP2 looks for tensors in what a forward pass returns, and sees into nothing else.
    """

    logp: Tensor
    entropy: Tensor
    values: Tensor | None


class DecoderPolicy(nn.Module):
    """A VLM whose forward pass scores the completions of packed groups.

    ``banned``: ids with no probability, the same ones that sampling leaves out: those that stand for pixels.
    ``value_head``: what it expects of its own captions, for losses with a critic.
    ``dtype``: what the body computes in by autocast, None for the weights' own; logits and all after them are float32.
    """

    def __init__(
        self,
        model: Any,
        banned: Sequence[int] = (),
        temperature: float = 1.0,
        value_head: ValueHead | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.value_head = value_head
        self.temperature = temperature
        self.register_buffer("banned", torch.tensor(sorted(banned), dtype=torch.long), persistent=False)
        self.attend(NAME)
        model.config.use_cache = False

    def attend(self, implementation: str) -> None:
        """Let the text decoder attend by this one of transformers' implementations."""
        self.model.config.get_text_config()._attn_implementation = implementation

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch) -> Scores:
        """Score all completion tokens of ``batch``."""
        # Each weight is used once: kept casts would only hold a second set of weights until the pass is over.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            hidden = pick(self.hidden(batch).flatten(0, 1), batch.predicts)
        states, head, bias = self.before_head(hidden)
        banned = self.get_buffer("banned")
        logp, entropy = token_scores(
            states, head, batch.targets, temperature=self.temperature, banned=banned, bias=bias
        )
        return Scores(logp, entropy, None if self.value_head is None else self.value_head(hidden))

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states (groups, columns, width)."""
        seen = self.look(batch.prompts)
        vision = {} if seen is None else {"mm_encoder_outputs": {"image": seen}}
        out = self.base(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            tree=batch.tree,
            **vision,
        )
        states: Tensor = out.last_hidden_state
        return states

    def before_head(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``hidden`` (tokens, width) as the head's matrix takes it, that matrix (vocabulary, width), and its bias."""
        return hidden, self.model.lm_head.weight, None

    def look(self, prompts: Sequence[PreparedPrompt]) -> Any:
        """What the tower makes of the prompts' images, each distinct one once; None without images."""
        images = [prompt.image for prompt in prompts if prompt.image is not None]
        if not images:
            return None
        distinct: dict[str, PreparedImage] = {image.uid: image for image in images}
        base = self.base
        patches = torch.cat([image.patches for image in distinct.values()]).to(self.device)
        grids = torch.cat([image.grid for image in distinct.values()]).to(self.device)
        trains = any(weight.requires_grad for weight in base.visual.parameters())
        with nullcontext() if trains else torch.no_grad():
            seen = base.get_image_features(patches, grids, return_dict=True)
        places = {uid: place for place, uid in enumerate(distinct)}
        return _rows(seen, [places[image.uid] for image in images])

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.model


def pick(rows: Tensor, places: Tensor) -> Tensor:
    """Rows (places, width) of ``rows`` (all, width), each as often as asked for.

    The gradients of a row that is picked more than once add up in one order. Indexing adds them in whichever order
    threads arrive, so that a run's weights differed in their last bits from those of the same run done again.
    """
    return functional.embedding(places, rows)


def _rows(seen: Any, places: list[int]) -> Any:
    """The tower's output for each prompt in turn, from that for distinct images."""
    out = copy(seen)
    out.pooler_output = tuple(seen.pooler_output[place] for place in places)
    if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL feeds several layers of the tower
        out.deepstack_features = [tuple(layer[place] for place in places) for layer in seen.deepstack_features]
    return out


def reference_logps(policy: DecoderPolicy, prompt: PreparedPrompt, tokens: Sequence[int]) -> Tensor:
    """The slow twin: log-probabilities (tokens,) of one completion, from the whole sequence and all its logits."""
    model, device = policy.model, policy.device
    ids = torch.cat([prompt.ids, torch.tensor(tokens)])[None].to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if prompt.image is not None:
        inputs["pixel_values"] = prompt.image.patches.to(device)
        inputs["image_grid_thw"] = prompt.image.grid.to(device)
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(**inputs).logits[0, len(prompt.ids) - 1 : -1].float() / policy.temperature
    banned = policy.get_buffer("banned")
    logps = logits.index_fill(1, banned, float("-inf")).log_softmax(dim=-1)
    targets = torch.tensor(tokens, device=device)
    found: Tensor = logps.gather(1, targets[:, None])[:, 0]
    return found
