"""Image-text matching by BLIP and BLIP-2 (transformers): the probability that a text describes an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import BadInput
from ..engines.model_folder import resolve_model
from ..engines.plain_text import plain_text
from ..images.decode import Pixels
from ..images.preprocess import Preprocess
from ..own_code import reason_in_words
from ..pretrained import load_reported, refuse_random
from .base import Pair, by_length, device_and_type, distinct_texts, normalised, padded

KINDS = ("blip", "blip-2")
MATCHING, CONTRASTIVE = ("itm_head",), ("vision_proj", "text_proj")  # prefixes of the heads' weights
HEADS = (*MATCHING, *CONTRASTIVE)
# Pillow's codes of resampling filters, which transformers uses, too.
RESAMPLING: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
LONGEST = 512  # maximum tokens of a text; the models' position tables end there


class ItmScorer:
    """``score`` is softmax(itm_head)[match] (Li et al., BLIP-2, 2023, section 3.2).

    Images are encoded once, then texts attend to them.
    """

    name = "itm"

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Preprocess, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._model, self._tokenizer, self._plain = model.eval(), tokenizer, plain_text(tokenizer)
        self.preprocess, self._mean, self._std = preprocess, mean, std
        weight = next(model.vision_model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._see = torch.compile(model.vision_model) if self._device.type == "cuda" else model.vision_model
        text = model.config.qformer_config if model.config.model_type == "blip-2" else model.config.text_config
        self._longest = min(LONGEST, text.max_position_embeddings)

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        """The vision encoder's states (n, patches + 1, width)."""
        batch = normalised(pixels, self._mean, self._std, self._device, self._dtype)
        states: Tensor = self._see(pixel_values=batch).last_hidden_state
        return states

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, truncated to what the model reads."""
        texts = [*map(self._plain, texts)]
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._longest).input_ids
        return ids

    @torch.inference_mode()
    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: list[list[int]] | None = None) -> list[float]:
        """The probability of a match for each pair."""
        logits = self.logits(images, pairs, tokens)
        chances: list[float] = logits.softmax(-1)[:, 1].tolist()
        return chances

    @torch.inference_mode()
    def logits(self, images: Tensor, pairs: Sequence[Pair], tokens: list[list[int]] | None = None) -> Tensor:
        """The matching head's two logits (no match, match) for each pair: (pairs, 2) float32."""
        texts = distinct_texts(pairs)
        told_of = self.tokenize(list(texts)) if tokens is None else tokens
        ids = [told_of[texts[pair.text]] for pair in pairs]
        out = torch.empty(len(pairs), 2, device=self._device)
        for batch in by_length([len(text_ids) + images.shape[1] // 4 for text_ids in ids]):  # queries cost, too
            batch_ids, mask = padded([ids[index] for index in batch], self._tokenizer.pad_token_id)
            shown = images[torch.tensor([pairs[index].image for index in batch], device=images.device)]
            asked = (batch_ids.to(self._device), mask.to(self._device), shown)
            out[torch.tensor(batch, device=self._device)] = self._match(*asked).float()
        return out

    def _match(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        everything = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        model = self._model
        if model.config.model_type == "blip":
            output = model.text_encoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=states,
                encoder_attention_mask=everything,
                return_dict=True,
            )
            logits: Tensor = model.itm_head(output.last_hidden_state[:, 0])
            return logits
        queries = model.query_tokens.expand(len(ids), -1, -1)
        count = queries.shape[1]
        output = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=count,
            attention_mask=torch.cat((mask.new_ones(len(ids), count), mask), dim=1),
            encoder_hidden_states=states,
            encoder_attention_mask=everything,
        )
        logits = model.itm_head(output.last_hidden_state[:, :count].to(model.itm_head.weight.dtype)).mean(dim=1)
        return logits


@dataclass(frozen=True)
class RetrievalSource:
    """A folder of a BLIP or BLIP-2 retrieval model; ``kind``: its model_type; ``activation``: of either encoder."""

    folder: Path
    kind: str
    activation: str
    preprocess: Preprocess
    mean: Sequence[float]
    std: Sequence[float]

    def seen_as(self) -> dict[str, Any]:
        """Preprocessing and activations, for fingerprints."""
        return {
            "activation": self.activation,
            "view": asdict(self.preprocess),
            "mean": list(self.mean),
            "std": list(self.std),
        }


@dataclass(frozen=True)
class RetrievalModel:
    """A BLIP or BLIP-2 retrieval model, its tokenizer and its image preprocessing."""

    model: Any
    tokenizer: Any
    preprocess: Preprocess
    mean: Sequence[float]
    std: Sequence[float]


def retrieval_source(name: str, kinds: Sequence[str] = KINDS) -> RetrievalSource:
    """Resolve ``tiny/itm``, a folder or a hub id of one of ``kinds``; no weights are loaded. Raises BadInput."""
    from transformers import AutoConfig, AutoImageProcessor

    folder = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type not in kinds:
            raise BadInput(
                f"{name}: a model of type {config.model_type!r}; image-text matching needs one of {', '.join(kinds)}"
            )
        images: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: does not load as an image-text matching model ({reason_in_words(error)})") from error
    size, crop = images.size, getattr(images, "do_center_crop", False)
    if crop or "height" not in size:
        raise BadInput(f"{name}: its images are not resized to one height and width; that is not supported")
    if int(images.resample) not in RESAMPLING:
        raise BadInput(f"{name}: its images are resized in way {int(images.resample)} of Pillow's; not supported")
    preprocess = Preprocess(size["height"], size["width"], "squash", RESAMPLING[int(images.resample)], by="torchvision")
    text = config.qformer_config if config.model_type == "blip-2" else config.text_config
    activation = f"vision {config.vision_config.hidden_act}, text {text.hidden_act}"
    mean, std = tuple(images.image_mean), tuple(images.image_std)
    return RetrievalSource(folder, config.model_type, activation, preprocess, mean, std)


def load_retrieval(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    kinds: Sequence[str] = KINDS,
    heads: Sequence[str] = MATCHING,
) -> RetrievalModel:
    """Load ``tiny/itm``, a folder or a hub id, of one of ``kinds``. ``heads``: those that the caller uses.

    Raises BadInput where it is none, or lacks weights.
    """
    from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, BlipForImageTextRetrieval

    where, number_type = device_and_type(device, dtype)
    source = retrieval_source(name, kinds)
    loader = {"blip": BlipForImageTextRetrieval, "blip-2": Blip2ForImageTextRetrieval}[source.kind]
    try:
        model, report = load_reported(loader, source.folder, dtype=number_type, called=name)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:  # raised by transformers for missing files and unknown models
        raise BadInput(f"{name}: does not load as an image-text matching model ({reason_in_words(error)})") from error
    if lacking := [head for head in heads if any(key.startswith(head) for key in report["missing_keys"])]:
        missing = "matching head (itm_head)" if heads == MATCHING else " and ".join(lacking)
        raise BadInput(f"{name}: has no trained {missing}; name an image-text retrieval checkpoint")
    refuse_random(report, name, loader.__name__, [re.escape(head) for head in HEADS if head not in heads])
    return RetrievalModel(model.to(where).eval(), tokenizer, source.preprocess, source.mean, source.std)


def load_itm(name: str, dtype: str = "auto", device: str = "auto") -> ItmScorer:
    """Load ``tiny/itm``, a folder or a hub id of a BLIP or BLIP-2 retrieval model. Raises BadInput where it is none."""
    retrieval = load_retrieval(name, dtype, device)
    return ItmScorer(retrieval.model, retrieval.tokenizer, retrieval.preprocess, retrieval.mean, retrieval.std)
