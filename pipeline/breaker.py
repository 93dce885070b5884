"""The circuit breaker: a run in which everything fails for one reason ends, instead of recording it for every row.

Two things end it, at any time of a run and in each worker for itself: :data:`MOST_REFUSALS` requests in a row that the
engine refused for good (a key, a quota), or :data:`MOST_FAILED_ROWS` rows in a row that ended in ``engine_error`` for
one reason, in which ids and numbers do not count. In a row means in the order in which they finish.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import RunFailed
from ..models.engine import RequestError

MOST_REFUSALS = 50
MOST_FAILED_ROWS = 200
LONGEST_REASON = 400  # characters of it in the line that ends the run
_WITH_A_DIGIT = re.compile(r"[\w-]*\d[\w-]*")

Shard = TypeVar("Shard")


@dataclass
class Answers:
    """How often a model answered since :func:`counting_answers`."""

    count: int = 0


_ANSWERS: ContextVar[Answers | None] = ContextVar("capipe_answers", default=None)


def counting_answers() -> Answers:
    """Count what this task, and those that it starts, get from models: so a row is known that none was asked about."""
    _ANSWERS.set(made := Answers())
    return made


def answered() -> None:
    """A model gave an answer."""
    if (answers := _ANSWERS.get()) is not None:
        answers.count += 1


def general_reason(reason: str, names: Sequence[str] = ()) -> str:
    """An error's text without ``names`` (a row's key and uid) and without ids and numbers: any word with a digit."""
    for name in filter(None, names):
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "#", reason)
    return _WITH_A_DIGIT.sub("#", reason)


class Refusals:
    """Requests that were refused for good since the engine last answered one."""

    def __init__(self) -> None:
        self._count = 0

    def failed(self, error: RequestError) -> None:
        """Raises RunFailed where that makes too many; one that may do better next time neither counts nor resets."""
        self._count += error.final
        if error.final and self._count >= MOST_REFUSALS:
            raise RunFailed(_ending(f"the engine refused {self._count} requests in a row for good", str(error)))

    def over(self) -> None:
        self._count = 0


class ErrorStreak(Generic[Shard]):
    """Rows that failed one after the other for one reason. ``shards``: those with such rows, to be committed later."""

    def __init__(self) -> None:
        self.shards = set[Shard]()
        self._reason, self._count = "", 0

    def failed(self, shard: Shard, reason: str, names: Sequence[str]) -> set[Shard]:
        """One more; where its reason is another one a new streak begins, and the shards of the last are returned.

        Raises RunFailed where that makes too many.
        """
        general = general_reason(reason, names)
        before = set[Shard]() if general == self._reason else self.over()
        self._reason, self._count = general, self._count + 1
        self.shards.add(shard)
        if self._count >= MOST_FAILED_ROWS:
            raise RunFailed(_ending(f"{self._count} rows in a row ended in engine_error for one reason", reason))
        return before - self.shards

    def over(self) -> set[Shard]:
        """The streak ends; returns the shards that had to wait for that."""
        before, self.shards = self.shards, set()
        self._reason, self._count = "", 0
        return before


def _ending(what: str, reason: str) -> str:
    reason = " ".join(reason.split())[:LONGEST_REASON]
    return f"{what}: {reason}; these rows are not recorded: mend that, and run the same command to have them done"
