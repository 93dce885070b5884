"""Tokens that a row cost: counted where its requests are answered, kept in columns of the row.

A row is worked on by one task, which sets the counters that :func:`add` finds in its context; tasks that it starts
inherit them. Requests that failed count nothing, as no engine says what they cost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ....manifests.schema import USAGE
from ....manifests.shards import Row
from ....models.engines.base import ChoiceScores, Completion, Prompt


@dataclass
class RowUsage:
    """Sums over a row's answered requests. None: one of them was not counted by its engine.

    ``prompt_tokens``: of whole prompts, whether or not a part of one was computed for another request;
    ``image_tokens``: those of them that stand for the image; ``output_tokens``: of generated texts, thoughts and
    rejected attempts included. An answer by the letters' log-probabilities generates none.
    """

    requests: int = 0
    prompt_tokens: int | None = 0
    image_tokens: int | None = 0
    output_tokens: int | None = 0

    def add(self, prompt: Prompt, answer: Completion | ChoiceScores) -> None:
        """Count an answer."""
        self.requests += 1
        image = 0 if prompt.image is None else answer.image_tokens
        output = answer.n_tokens if isinstance(answer, Completion) else 0
        self.prompt_tokens = _sum(self.prompt_tokens, answer.prompt_tokens)
        self.image_tokens = _sum(self.image_tokens, image)
        self.output_tokens = _sum(self.output_tokens, output)

    @property
    def columns(self) -> dict[str, int | None]:
        """The columns of :data:`~capipe.manifests.schema.USAGE`; null for a row without requests."""
        return {field.name: getattr(self, field.name) if self.requests else None for field in USAGE}


_CURRENT: ContextVar[RowUsage | None] = ContextVar("usage", default=None)


def add(prompt: Prompt, answer: Completion | ChoiceScores) -> None:
    """Count an answer for the row that the running task works on, if it works on one."""
    usage = _CURRENT.get()
    if usage is not None:
        usage.add(prompt, answer)


async def counted(process: Callable[[Row], Awaitable[dict[str, Any]]], row: Row) -> dict[str, Any]:
    """The output row of ``process``, with the columns of what it cost."""
    usage = RowUsage()
    token = _CURRENT.set(usage)
    try:
        out = await process(row)
    finally:
        _CURRENT.reset(token)
    return {**out, **usage.columns}


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more
