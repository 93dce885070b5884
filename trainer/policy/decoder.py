"""Policy of decoder VLMs (Qwen2.5-VL, Qwen3-VL, Qwen3.5): log-probabilities of packed completions.

The vision encoder processes each image once, the decoder each prompt once (with gradients), the head only the states
that predict completion tokens. :func:`reference_logps` is the slow reference: transformers' own forward pass, one
caption at a time, nothing shared.
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
from .fused_norm import fuse_norms
from .packing.attention import NAME, no_mask
from .packing.recurrent import follow_trees
from .token_logprobs import token_scores


class Scores(NamedTuple):
    """Log-probability, entropy and value of each completion token, float32 (tokens,).

    A tuple, since FSDP2 looks for tensors in a forward pass's output, and does not look into dataclasses.
    """

    logp: Tensor
    entropy: Tensor
    values: Tensor | None


class DecoderPolicy(nn.Module):
    """A VLM whose forward pass scores the completions of packed groups.

    ``banned``: ids with no probability, the same as in sampling: image placeholder ids.
    ``value_head``: predicts its captions' rewards, for losses with a critic.
    ``dtype``: autocast dtype of the body and of the head's factors, None for the weights' own; logits and everything
    after them are float32.
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
        fuse_norms(model)
        follow_trees(model)
        model.config.use_cache = False

    def attend(self, implementation: str) -> None:
        """Set the text decoder's attention implementation (transformers' name)."""
        self.model.config.get_text_config()._attn_implementation = implementation

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def model_bytes(self) -> int:
        """Size of the model's weights as a file, in the computing type."""
        weights = sum(weight.numel() for weight in self.model.parameters())
        return int(weights) * (4 if self.dtype is None else 2)

    def forward(self, batch: Batch) -> Scores:
        """Score all completion tokens of ``batch``."""
        # Each weight is used once: cached casts would only hold a second set of weights during the pass.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            hidden = pick(self.hidden(batch).flatten(0, 1), batch.predicts)
        states, head, bias = self.before_head(hidden)
        banned = self.get_buffer("banned")
        logp, entropy = token_scores(
            states,
            head,
            batch.targets,
            temperature=self.temperature,
            banned=banned,
            bias=bias,
            dtype=self.dtype,
        )
        return Scores(logp, entropy, None if self.value_head is None else self.value_head(hidden))

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states (rows, columns, width)."""
        seen = self.look(batch.prompts)
        vision = {} if seen is None else {"mm_encoder_outputs": {"image": seen}}
        out = self.base(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            attention_mask=no_mask(batch.ids.device),
            tree=batch.tree,
            **vision,
        )
        states: Tensor = out.last_hidden_state
        return states

    def before_head(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs of the head's matrix (tokens, width), the matrix (vocabulary, width), and its bias."""
        return hidden, self.model.lm_head.weight, None

    def look(self, prompts: Sequence[PreparedPrompt]) -> Any:
        """Vision encoder's output for the prompts' images, each distinct image encoded once; None without images."""
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
        places = {uid: index for index, uid in enumerate(distinct)}
        return _rows(seen, [places[image.uid] for image in images])

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.model


def pick(rows: Tensor, places: Tensor) -> Tensor:
    """Select rows: (places, width) from ``rows`` (all, width), with repeats.

    The gradients of a repeated row are summed in a fixed order. Indexing sums them in the order in which threads
    arrive, so that the weights of a repeated run differed in their last bits.
    """
    return functional.embedding(places, rows)


def _rows(seen: Any, places: list[int]) -> Any:
    """Vision encoder's output per prompt, from the output for distinct images."""
    out = copy(seen)
    out.pooler_output = tuple(seen.pooler_output[index] for index in places)
    if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL uses several layers of the encoder
        out.deepstack_features = [tuple(layer[index] for index in places) for layer in seen.deepstack_features]
    return out


def reference_logps(policy: DecoderPolicy, prompt: PreparedPrompt, tokens: Sequence[int]) -> Tensor:
    """Slow reference: log-probabilities (tokens,) of one completion, from the whole sequence and all its logits."""
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
    chosen: Tensor = logps.gather(1, targets[:, None])[:, 0]
    return chosen
