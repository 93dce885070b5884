"""Likelihood of texts under a causal language model: the log-probability of each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ..engines.model_folder import resolve_model
from ..engines.plain_text import plain_text
from ..own_code import reason_in_words
from ..pretrained import load_weights
from .base import by_length, device_and_type, padded

TOKENS_PER_BATCH = 1024  # each has a row of logits of vocabulary size


class TextScorer:
    """A frozen causal model. Texts follow its beginning-of-sequence token, so that their first token is scored, too."""

    def __init__(self, model: Any, tokenizer: Any, start: int, longest: int) -> None:
        self._model, self._tokenizer, self._start, self.longest = model.eval(), tokenizer, start, longest
        self._plain = plain_text(tokenizer)
        self.device = next(model.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, truncated to ``longest``."""
        texts = [*map(self._plain, texts)]
        encoded = self._tokenizer(texts, add_special_tokens=False, truncation=True, max_length=self.longest)
        ids: list[list[int]] = encoded.input_ids
        return ids

    @torch.inference_mode()
    def logps(self, texts: Sequence[str]) -> list[list[float]]:
        """Natural log-probability of each token of each text, given those before it."""
        ids = [[self._start, *tokens] for tokens in self.tokenize(texts)]
        out: list[list[float]] = [[] for _ in ids]
        for batch in by_length([len(tokens) for tokens in ids], TOKENS_PER_BATCH):
            batch_ids, mask = (
                tensor.to(self.device) for tensor in padded([ids[index] for index in batch], self._start)
            )
            logits = self._model(input_ids=batch_ids, attention_mask=mask).logits
            logps = token_logps(logits[:, :-1], batch_ids[:, 1:]).cpu()
            for at, row in zip(batch, logps, strict=True):
                out[at] = row[: len(ids[at]) - 1].tolist()
        return out


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """float32 (n, tokens), from logits (n, tokens, vocabulary) and the ids of the tokens that followed, (n, tokens)."""
    chosen = logits.gather(-1, ids[..., None])[..., 0].float()
    normalisers = torch.stack([row.float().logsumexp(-1) for row in logits])  # one text's logits in float32 at a time
    return chosen - normalisers


def load_text_scorer(name: str, dtype: str = "auto", device: str = "auto") -> TextScorer:
    """Load ``tiny/opt``, a folder or a hub id. Raises BadInput where it is no causal model with a bos token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, number_type = device_and_type(device, dtype)
    path: Path = resolve_model(name)
    try:
        model = load_weights(AutoModelForCausalLM, path, dtype=number_type, called=name).to(where).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:  # raised by transformers for missing files and unknown models
        raise BadInput(f"{name}: does not load as a causal language model ({reason_in_words(error)})") from error
    of_config, of_tokenizer = model.config.get_text_config().bos_token_id, tokenizer.bos_token_id
    start = of_tokenizer if of_tokenizer is not None else of_config
    if start is None:
        raise BadInput(f"{name}: has no token of beginning (bos), from which texts are read; name another model")
    if not _causal(model, int(start)):
        raise BadInput(
            f"{name}: reads texts both ways, so it tells no probability of what follows; name a causal model"
        )
    return TextScorer(model, tokenizer, int(start), model.config.get_text_config().max_position_embeddings - 1)


@torch.inference_mode()
def _causal(model: Any, start: int) -> bool:
    """Whether later tokens change nothing before them. Tested: transformers loads bidirectional models as well."""
    ids = torch.tensor([[start, 5, 6], [start, 5, 7]], device=model.device)
    first, second = model(input_ids=ids).logits[:, 1].float()
    rounding = 1e-5 if model.dtype == torch.float32 else 1e-2
    return bool((first - second).abs().max() <= rounding * (1 + first.abs().max()))
