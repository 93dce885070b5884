"""The engine interface: one model, many concurrent callers; batching is up to the engine.

Stages, the quiz reader and rewards use :class:`Engine` only. Three implementations exist: ``vllm`` (in process),
``transformers`` (own micro-batcher) and ``http`` (any OpenAI-compatible server).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..images.grid import ImageGrid

FinishReason = Literal["stop", "length"]
LARGEST_SHARE = 1 - 2**-24  # of barred ids; float32 rounds to 1 where they have nearly everything
PromptKey = tuple[str | None, str, str | None, str, str | None]


class RequestError(Exception):
    """One request failed; the engine and other requests are unaffected. The message is the row's reason.

    ``final``: all requests share the reason (a refused key, an exhausted quota, a field the server does not know), so
    that none can succeed until somebody changes something.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Refused(RequestError):
    """The model, or a filter around it, declines to answer this request. Retrying is useless.

    ``words``: the text written instead of an answer, if any.
    """

    def __init__(self, message: str, words: str = "", *, final: bool = False) -> None:
        super().__init__(message, final=final)
        self.words = words


class Rejected(RequestError):
    """The engine does not accept this request as it is; a retry fails, too. Other requests may succeed."""


class EngineDead(Exception):
    """The engine itself is gone: every request in flight is lost and a new engine is needed."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of a completion. ``temperature=0`` is greedy.

    Samples are a pure function of ``(seed, position)``: the same request gives the same text in any batch.
    ``repetition_penalty``: logits of tokens in prompt and answer are divided by it, or multiplied where negative
    (CTRL, arXiv 1909.05858 §4.1); ``beams``: width of a beam search, 1 for none; ``no_repeat_ngram``: n-grams of this
    size occur once, 0 for no such rule; ``min_tokens``: the answer does not end before. An engine that does not support
    one of these says so (:class:`Selective`). Raises ValueError for numbers that no engine can sample with.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    repetition_penalty: float = 1.0
    beams: int = 1
    no_repeat_ngram: int = 0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty must be a positive number, 1 for none, not {self.repetition_penalty}")
        if self.beams < 1 or self.no_repeat_ngram < 0:
            raise ValueError("beams must be at least 1 and no_repeat_ngram at least 0")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"beams {self.beams}: a search takes the likeliest text; set temperature to 0, or beams to 1"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be from 0 to max_tokens ({self.max_tokens}), not {self.min_tokens}")


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image for a model.

    ``pixels``: uint8 ``(height, width, 3)`` RGB, upright, already on the model's pixel grid (in-process engines).
    ``encoded``: the original file's bytes, for HTTP engines, or a copy of them that any reader shows correctly.
    ``uid``: content hash; lets engines cache and share by identity instead of hashing pixels again.
    """

    uid: str
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    encoded: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A single-turn chat: optional system text, optional image (placed before the text), the user's text.

    ``answer_prefix``: start of the assistant's turn, for models that are to continue it; ``thought``: a thinking
    model's thought, placed before that between the model's own tags.
    """

    text: str
    image: ImageInput | None = None
    system: str | None = None
    answer_prefix: str = ""
    thought: str | None = None

    @property
    def key(self) -> PromptKey:
        """Identity of the prompt; an image counts by its content hash."""
        image = None if self.image is None else self.image.uid
        return self.system, self.text, self.thought, self.answer_prefix, image


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """``logprobs``: fill Completion.logprobs, the log-probability of each sampled token under the untempered model.

    Ids that are never sampled (those of pixels) have no part of the probability. ``tempered``: under the distribution
    that was sampled from instead, with its temperature and nucleus. vLLM and servers report the former alone: they
    reject such a request, unless both are the same.
    ``json_schema``: as JSON text; an engine that ``guides`` constrains decoding to JSON of this schema, in its order of
    properties, and takes log-probabilities among the allowed tokens. Others ignore it.
    """

    prompt: Prompt
    sampling: Sampling = Sampling()
    logprobs: bool = False
    tempered: bool = False
    json_schema: str | None = None

    def refuse_tempered(self, engine: str) -> None:
        """Raise Rejected if log-probabilities are wanted that ``engine`` does not report."""
        sampling = self.sampling
        if self.logprobs and self.tempered and (sampling.temperature not in (0, 1) or sampling.top_p < 1):
            raise Rejected(f"{engine} reports log-probabilities of the untempered model only")


def among_allowed(logprob: float, barred: Iterable[float]) -> float:
    """Log-probability among the ids that may be sampled, from that among all ids and those of the barred ids.

    log p - log(1 - sum of the barred ids' probabilities).
    """
    return logprob - math.log1p(-min(sum(map(math.exp, barred)), LARGEST_SHARE))


@dataclass(frozen=True, slots=True)
class Thought:
    """Text that a model wrote between its thinking tags, before the answer. ``closed``: it ended before the limit."""

    text: str
    closed: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """``token_ids`` and ``logprobs`` are parallel and include the end-of-turn token where the model wrote it.

    ``thought``: the thought before the answer, which is not part of ``text``; its tokens are among the others. HTTP
    servers do not return token ids: there ``token_ids`` is empty and ``n_tokens`` is the server's own count, None where
    it does not count.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    n_tokens: int | None
    logprobs: tuple[float, ...] | None = None
    thought: Thought | None = None


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """Score which of ``choices`` (each one token, e.g. ``"A"``) comes first in the assistant's turn. No sampling."""

    prompt: Prompt
    choices: tuple[str, ...]

    @property
    def continuations(self) -> tuple[str, ...]:
        """The choices as the model would write them: with a space before, where the answer has begun without one."""
        begun = self.prompt.answer_prefix
        return tuple(f" {choice}" for choice in self.choices) if begun and not begun[-1].isspace() else self.choices


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """Log-probabilities, parallel to the request's choices. ``None`` where a server did not report that choice.

    ``first``: the most likely first token, whether it is a choice or not, where known.
    """

    logprobs: tuple[float | None, ...]
    first: str = ""

    @property
    def best(self) -> int | None:
        """Index of the most likely reported choice; None when nothing was reported."""
        scored = [(value, -index) for index, value in enumerate(self.logprobs) if value is not None]
        return -max(scored)[1] if scored else None


@runtime_checkable
class Engine(Protocol):
    """``generate`` and ``choose`` raise :class:`RequestError` or :class:`EngineDead`, nothing else.

    ``concurrency``: requests the engine works on at once; callers keep at least twice as many queued. For servers it
    adapts while they work: read it again for each decision. ``grid``: the pixel grid of images, or None when the engine
    takes the encoded bytes instead. ``guides``: whether it applies ``GenerationRequest.json_schema``; output truncated
    at its length is not valid even so. ``context``: the maximum number of tokens of a prompt and its answer together,
    None where a server does not say.
    """

    grid: ImageGrid | None
    guides: bool

    @property
    def concurrency(self) -> int: ...

    @property
    def context(self) -> int | None: ...

    async def generate(self, request: GenerationRequest) -> Completion: ...

    async def choose(self, request: ChoiceRequest) -> ChoiceScores: ...

    async def count_tokens(self, prompt: Prompt) -> int | None:
        """Number of tokens of a prompt without an image, as the model gets it; None where only a server can count."""
        ...

    async def aclose(self) -> None: ...


@runtime_checkable
class Selective(Protocol):
    """An engine that does not support every way of sampling."""

    def unsupported(self, sampling: Sampling) -> str | None:
        """Why requests with ``sampling`` would fail, and what to do; None where they would not."""
        ...


def unsupported(engine: Engine, sampling: Sampling) -> str | None:
    """Why the engine would refuse requests with ``sampling``; None for one that does not say."""
    return engine.unsupported(sampling) if isinstance(engine, Selective) else None


@runtime_checkable
class Batching(Protocol):
    """An engine that may compute the requests that wait together as one batch.

    Sums in another order differ in their last digits, so where ``batches``, those of log-probabilities depend on which
    requests these are.
    """

    batches: bool


def batches(engine: Engine) -> bool:
    """Whether the last digits of the engine's log-probabilities depend on the requests that wait together."""
    return isinstance(engine, Batching) and engine.batches
