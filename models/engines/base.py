"""The engine contract: one model, many concurrent callers; batching is the engine's own business.

Stages, the quiz reader and rewards are written against :class:`Engine` alone. Three implementations exist: ``vllm``
(in process), ``transformers`` (own micro-batcher) and ``http`` (any OpenAI-compatible server).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..images.grid import ImageGrid

FinishReason = Literal["stop", "length"]
PromptKey = tuple[str | None, str, str | None, str, str | None]


class RequestError(Exception):
    """One request failed; the engine lives on and the others are untouched. The message is the row's reason.

    ``final``: the reason is shared by all requests (a refused key, a spent quota, a field the server does not know), so
    that none can succeed until somebody changes something.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Refused(RequestError):
    """The model, or a filter around it, declines to answer this request. Asking again is no use.

    ``words``: what was written instead of an answer, if anything.
    """

    def __init__(self, message: str, words: str = "", *, final: bool = False) -> None:
        super().__init__(message, final=final)
        self.words = words


class Rejected(RequestError):
    """The engine does not take this request as it is: the same one will fare no better. Others may."""


class EngineDead(Exception):
    """The engine itself is gone: every request in flight is void and a new engine is needed."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a completion. ``temperature=0`` is greedy.

    Draws are a pure function of ``(seed, position)``: the same request gives the same text whatever shares its batch.
    Raises ValueError for numbers that no engine can sample with.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image on its way to a model.

    ``pixels``: uint8 ``(height, width, 3)`` RGB, upright, already on the model's pixel grid (in-process engines).
    ``encoded``: the original file's bytes, for HTTP engines, or a copy of them that any reader shows as it should be.
    ``uid``: content hash, lets engines cache and share by identity instead of hashing pixels again.
    """

    uid: str
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    encoded: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A single-turn chat: optional system text, optional image (placed before the text), the user's text.

    ``answer_prefix`` is put at the start of the assistant's turn, for models that are to continue it; ``thought``, of a
    model that thinks, before it, between the model's own tags.
    """

    text: str
    image: ImageInput | None = None
    system: str | None = None
    answer_prefix: str = ""
    thought: str | None = None

    @property
    def key(self) -> PromptKey:
        """What tells prompts apart; an image counts by its content hash."""
        image = None if self.image is None else self.image.uid
        return self.system, self.text, self.thought, self.answer_prefix, image


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """``logprobs``: fill Completion.logprobs, the log-probability of each sampled token under the untempered model.

    ``json_schema``: as JSON text; an engine that ``guides`` lets the model write nothing but JSON of this schema, in
    its order of properties, and takes log-probabilities among the tokens that it allows. Others ignore it.
    """

    prompt: Prompt
    sampling: Sampling = Sampling()
    logprobs: bool = False
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class Thought:
    """What a model wrote between its tags before the answer. ``closed``: it came to its end, and not to the limit."""

    text: str
    closed: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """``token_ids`` and ``logprobs`` run in parallel and include the end-of-turn token where the model wrote it.

    ``thought``: what the model thought first, which is no part of ``text``; its tokens are among the others.
    HTTP servers do not return token ids: there ``token_ids`` is empty and ``n_tokens`` is the server's own count, None
    where it does not count.
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


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """Log-probabilities, parallel to the request's choices. ``None`` where a server did not report that choice.

    ``first``: what would come first whether it is a choice or not, where that is known.
    """

    logprobs: tuple[float | None, ...]
    first: str = ""

    @property
    def best(self) -> int | None:
        """Index of the likeliest reported choice; None when nothing was reported."""
        scored = [(value, -index) for index, value in enumerate(self.logprobs) if value is not None]
        return -max(scored)[1] if scored else None


@runtime_checkable
class Engine(Protocol):
    """``generate`` and ``choose`` raise :class:`RequestError` or :class:`EngineDead`, nothing else.

    ``concurrency``: requests the engine works on at once; callers keep at least twice as many queued. What a server
    takes is found while it works, so it changes: read it again for each decision.
    ``grid``: where pixels must lie, or None when the engine wants the encoded bytes instead.
    ``guides``: whether it heeds ``GenerationRequest.json_schema``; what was cut off at its length is not valid even so.
    ``context``: the most tokens that a prompt and its answer may have together, None where a server does not say.
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
        """How many tokens a prompt without an image is as the model gets it; None where a server has the tokenizer."""
        ...

    async def aclose(self) -> None: ...
