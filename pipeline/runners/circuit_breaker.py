"""Circuit breaker: ends a run that fails everywhere for one reason, before every row records the error.

Each worker counts for itself, throughout the run. Any of these ends it: :data:`MOST_REFUSALS` consecutive requests that
the engine refused for good (a key, a quota); as many consecutive images or texts whose requests it rejected for one
reason (an unknown field, a prompt that is too long); :data:`MOST_FAILED_ROWS` consecutive rows in ``engine_error`` for
one reason. Reasons are compared without ids and numbers, in the order of completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...errors import RunFailed
from ...models.engines.base import Rejected, RequestError

MOST_REFUSALS = 50
MOST_FAILED_ROWS = 200
LONGEST_REASON = 400  # characters of it in the line that ends the run
_WITH_A_DIGIT = re.compile(r"[\w-]*\d[\w-]*")

Shard = TypeVar("Shard")


@dataclass
class Answers:
    """Number of model answers since :func:`counting_answers`."""

    count: int = 0


_ANSWERS: ContextVar[Answers | None] = ContextVar("capipe_answers", default=None)


def counting_answers() -> Answers:
    """Count model answers to this task and its subtasks: a row without any says nothing about the engine."""
    _ANSWERS.set(answers := Answers())
    return answers


def answered() -> None:
    """Count an answer of a model."""
    if (answers := _ANSWERS.get()) is not None:
        answers.count += 1


def general_reason(reason: str, names: Sequence[str] = ()) -> str:
    """An error's text without ``names`` (a row's key and uid) and without words that have a digit (ids, numbers)."""
    for name in filter(None, names):
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "#", reason)
    return _WITH_A_DIGIT.sub("#", reason)


class Refusals:
    """Consecutive requests that the engine refused for good, or rejected for one reason.

    Rejections about one image or text count once: its content may be the cause of all of them.
    """

    def __init__(self) -> None:
        self._refused = 0
        self._rejected, self._reason = set[str](), ""

    def failed(self, error: RequestError, about: str = "") -> None:
        """Count a failed request; transient errors neither count nor reset. Raises RunFailed at the limit.

        ``about``: identifies the request's image or text.
        """
        if error.final:
            self._refused += 1
            if self._refused >= MOST_REFUSALS:
                raise RunFailed(_ending(f"the engine refused {self._refused} requests in a row for good", str(error)))
        elif isinstance(error, Rejected):
            reason = general_reason(str(error))
            self._rejected = self._rejected | {about} if reason == self._reason else {about}
            self._reason = reason
            if len(self._rejected) >= MOST_REFUSALS:
                what = f"the engine rejected the requests about {len(self._rejected)} images or texts in a row"
                raise RunFailed(_ending(what, str(error)))

    def over(self) -> None:
        self._refused, self._rejected = 0, set()


class ErrorStreak(Generic[Shard]):
    """Consecutive rows that failed for one reason. ``shards``: shards with such rows; their commits wait."""

    def __init__(self) -> None:
        self.shards = set[Shard]()
        self._reason, self._count = "", 0

    def failed(self, shard: Shard, reason: str, names: Sequence[str]) -> set[Shard]:
        """Count a failed row; another reason begins a new streak. Returns the shards that no longer have to wait.

        Raises RunFailed at the limit.
        """
        general = general_reason(reason, names)
        before = set[Shard]() if general == self._reason else self.over()
        self._reason, self._count = general, self._count + 1
        self.shards.add(shard)
        if self._count >= MOST_FAILED_ROWS:
            raise RunFailed(_ending(f"{self._count} rows in a row ended in engine_error for one reason", reason))
        return before - self.shards

    def over(self) -> set[Shard]:
        """End the streak. Returns the shards that waited for its end."""
        before, self.shards = self.shards, set()
        self._reason, self._count = "", 0
        return before


def _ending(what: str, reason: str) -> str:
    reason = " ".join(reason.split())[:LONGEST_REASON]
    return f"{what}: {reason}; these rows are not recorded: fix that, and run the same command to have them done"
