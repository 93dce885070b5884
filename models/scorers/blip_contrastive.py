"""BLIP's contrastive heads (transformers): the cosine of an image's and a text's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..engines.plain_text import plain_text
from ..images.decode import Pixels
from .base import Pair, by_length, cosines, distinct_texts, normalised, padded
from .itm import CONTRASTIVE, RetrievalModel, load_retrieval


class BlipScorer:
    """``score`` is the cosine of the two heads' vectors in [-1, 1] (Li et al., BLIP, 2022, section 3.2, ITC).

    The image's vector is from the vision encoder's first state, the text's from that of the text encoder, without
    image.
    """

    name = "blip"

    def __init__(self, retrieval: RetrievalModel) -> None:
        self._model, self._tokenizer = retrieval.model, retrieval.tokenizer
        self._plain = plain_text(retrieval.tokenizer)
        self.preprocess, self._mean, self._std = retrieval.preprocess, retrieval.mean, retrieval.std
        weight = next(self._model.vision_model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        on_gpu = self._device.type == "cuda"
        self._see = torch.compile(self._model.vision_model) if on_gpu else self._model.vision_model

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        """Unit vectors (n, width), float32."""
        batch = normalised(pixels, self._mean, self._std, self._device, self._dtype)
        states = self._see(pixel_values=batch).last_hidden_state
        return functional.normalize(self._model.vision_proj(states[:, 0]).float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, truncated to what the model reads."""
        longest = self._model.config.text_config.max_position_embeddings
        texts = [*map(self._plain, texts)]
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=longest).input_ids
        return ids

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, width), float32."""
        return self.encode_tokens(self.tokenize(texts))

    @torch.inference_mode()
    def encode_tokens(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Unit vectors (n, width), float32, of tokenized texts."""
        out = torch.empty(len(tokens), self._model.text_proj.out_features, device=self._device)
        for batch in by_length([len(text) for text in tokens]):
            ids, mask = padded([tokens[index] for index in batch], self._tokenizer.pad_token_id)
            read: dict[str, Any] = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
            states = self._model.text_encoder(**read).last_hidden_state
            vectors = functional.normalize(self._model.text_proj(states[:, 0]).float(), dim=-1)
            out[torch.tensor(batch, device=self._device)] = vectors
        return out

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: list[list[int]] | None = None) -> list[float]:
        """The cosine of each pair; a text used with several images is encoded once."""
        texts = distinct_texts(pairs)
        features = self.encode_tokens(self.tokenize(list(texts)) if tokens is None else tokens)
        return cosines(images, features, pairs)


def load_blip(name: str, dtype: str = "auto", device: str = "auto") -> BlipScorer:
    """Load a BLIP retrieval model, a folder or a hub id. Raises BadInput for others, or without contrastive heads."""
    return BlipScorer(load_retrieval(name, dtype, device, kinds=("blip",), heads=CONTRASTIVE))
