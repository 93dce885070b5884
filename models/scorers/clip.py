"""CLIP scores by open_clip: the cosine of an image's and a text's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...errors import BadInput
from ..engines.plain_text import PlainText, plain_text, spelled
from ..hub import hub_name, snapshot
from ..images.decode import Pixels
from ..images.preprocess import Preprocess
from ..model_json import read_json
from ..own_code import ask_nothing, reason_in_words
from .base import Pair, PlainCleaning, by_length, cleaned, cosines, device_and_type, distinct_texts, normalised, padded
from .clip_source import CONFIG, Activation, ClipSource, Tag, clip_source

OF_TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")  # prefixes of tokenizer files


class ClipScorer:
    """Any open_clip model. ``score`` is the cosine in [-1, 1], neither clipped nor scaled (Radford et al., 2021)."""

    name = "clip"

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Preprocess, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self.preprocess, self._mean, self._std = preprocess, mean, std
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._see = torch.compile(model.encode_image) if self._device.type == "cuda" else model.encode_image
        self._trims = _ends_early(model) and _trimming_changes_nothing(model, tokenizer)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._device
        return device

    @property
    def width(self) -> int:
        """Width of a feature vector."""
        return self.encode_images([np.zeros((self.preprocess.height, self.preprocess.width, 3), dtype=np.uint8)]).shape[
            1
        ]

    @torch.inference_mode()
    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        """Unit vectors (n, width), float32."""
        batch = normalised(pixels, self._mean, self._std, self._device, self._dtype)
        return functional.normalize(self._see(batch).float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, context) from open_clip's tokenizer."""
        return token_ids(self._tokenizer, texts)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, width), float32, of texts truncated to what the model reads."""
        return self.encode_tokens(self.tokenize(texts))

    @torch.inference_mode()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Unit vectors (n, width), float32, of tokenized texts."""
        ids = tokens.to(self._device)
        lengths = (ids.argmax(-1) + 1).tolist() if self._trims else [ids.shape[1]] * len(ids)
        out = torch.empty(len(ids), 0, device=self._device)
        for batch in by_length(lengths):
            where = torch.tensor(batch, device=self._device)
            length = lengths[batch[0]]
            encode = encode_trimmed if self._trims else _encode_whole
            features = functional.normalize(encode(self._model, ids[where, :length]).float(), dim=-1)
            if not out.shape[1]:
                out = features.new_empty(len(ids), features.shape[1])
            out[where] = features
        return out

    @torch.inference_mode()
    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Tensor | None = None) -> list[float]:
        """The cosine of each pair; a text used with several images is encoded once."""
        texts = distinct_texts(pairs)
        features = self.encode_tokens(self.tokenize(list(texts)) if tokens is None else tokens)
        return cosines(images, features, pairs)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (n, context) as from open_clip's ``tokenizer``, but faster where it is one of transformers'."""
    from open_clip.tokenizer import HFTokenizer

    usual = type(tokenizer) is HFTokenizer and not tokenizer.tokenizer_mode and not tokenizer.strip_sep_token
    if not usual or tokenizer.tokenizer.padding_side != "right":
        ids: Tensor = tokenizer(list(texts))
        return ids
    inner, length = tokenizer.tokenizer, tokenizer.context_length
    texts = [cleaned(tokenizer.clean_fn, text) for text in texts]
    token_lists = inner(texts, max_length=length, truncation=True).input_ids
    ids, _ = padded(token_lists, inner.pad_token_id)
    return functional.pad(ids, (0, length - ids.shape[1]), value=inner.pad_token_id)


def encode_trimmed(model: Any, ids: Tensor) -> Tensor:
    """Text features (n, width) of ids (n, length) shorter than the model's context.

    Equal to ``model.encode_text`` of the padded ids: attention is causal, so what follows a text's end changes nothing.
    """
    length = ids.shape[1]
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    features: Tensor = x[torch.arange(len(ids), device=ids.device), ids.argmax(-1)] @ model.text_projection
    return features


def _encode_whole(model: Any, ids: Tensor) -> Tensor:
    features: Tensor = model.encode_text(ids)
    return features


def _ends_early(model: Any) -> bool:
    """Whether this is OpenAI's CLIP architecture: a causal text encoder, read at the end token."""
    from open_clip import CLIP

    return (
        type(model) is CLIP
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
        and isinstance(model.text_projection, torch.nn.Parameter)
    )


@torch.inference_mode()
def _trimming_changes_nothing(model: Any, tokenizer: Any) -> bool:
    """Tested on one text, since open_clip's configs can change an encoder in many ways."""
    ids = tokenizer(["a photo of two dogs"]).to(next(model.parameters()).device)
    length = int(ids.argmax()) + 1
    whole, trimmed = model.encode_text(ids).float(), encode_trimmed(model, ids[:, :length]).float()
    return bool(functional.cosine_similarity(whole, trimmed).item() > 1 - 1e-4)


def load_clip(name: str, dtype: str = "auto", device: str = "auto") -> ClipScorer:
    """Load ``tiny/clip``, a folder with ``open_clip_config.json``, ``ARCHITECTURE:PRETRAINED``, or a hub id.

    Raises BadInput where there is none such, it does not load, or not with the activation it was trained with.
    """
    import open_clip

    where, number_type = device_and_type(device, dtype)
    source = clip_source(name)
    ask_nothing()
    tag = source.place if isinstance(source.place, Tag) else None
    try:
        # Weights are read by safetensors or torch's weights-only loader: nothing in them is executed.
        model = open_clip.create_model(
            f"local-dir:{source.place}" if tag is None else tag.architecture,
            pretrained=None if tag is None else tag.pretrained,
            force_quick_gelu=source.activation == "quick_gelu",
            device=where,
            weights_only=True,
            require_pretrained=True,
        ).to(number_type)
        tokenizer = _tokenizer(source)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(reason_in_words(error, whole=True).split())
        raise BadInput(f"{name}: open_clip cannot load it ({reason})") from error
    if (built := built_activation(model)) not in (None, source.activation):
        raise BadInput(f"{name}: open_clip builds it with {built}; its weights were trained with {source.activation}")
    return ClipScorer(model, tokenizer, source.preprocess, source.mean, source.std)


def built_activation(model: Any) -> Activation | None:
    """The activation of open_clip's own transformer blocks in a model; None where it has none of them."""
    from open_clip.transformer import QuickGELU

    quick = {isinstance(module, QuickGELU) for name, module in model.named_modules() if name.endswith("mlp.gelu")}
    return None if not quick else "quick_gelu" if True in quick else "gelu"


def _tokenizer(source: ClipSource) -> Any:
    """The source's tokenizer, made to read texts as plain characters."""
    return read_plainly(_own_tokenizer(source))


def read_plainly(tokenizer: Any) -> Any:
    """Make open_clip's ``tokenizer`` read texts as plain characters, whatever token they spell.

    Tokens are broken up after cleaning, which turns ``&lt;END_of_text&gt;`` into ``<end_of_text>``.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if isinstance(tokenizer, HFTokenizer):
        tokenizer.clean_fn = PlainCleaning(tokenizer.clean_fn, plain_text(tokenizer.tokenizer))
    elif isinstance(tokenizer, SimpleTokenizer):
        control = spelled(tokenizer.decoder[token] for token in tokenizer.all_special_ids)
        tokenizer.clean_fn = PlainCleaning(tokenizer.clean_fn, PlainText(control))
    return tokenizer


def _own_tokenizer(source: ClipSource) -> Any:
    """The tokenizer of a tag or a folder; where a folder has none, the one its configuration names on the hub."""
    import open_clip
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    if isinstance(source.place, Tag):
        return open_clip.get_tokenizer(source.place.architecture)
    text = read_json(source.place / CONFIG)["model_cfg"].get("text_cfg") or {}
    named = hub_name(text.get("hf_tokenizer_name") or "")
    if named is None or any(file.name.startswith(OF_TOKENIZERS) for file in source.place.iterdir()):
        return open_clip.get_tokenizer(f"local-dir:{source.place}")
    return HFTokenizer(
        str(snapshot(named, "tokenizer")),
        context_length=text.get("context_length", DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=text.get("tokenizer_mode"),
        **text.get("tokenizer_kwargs", {}),
    )
