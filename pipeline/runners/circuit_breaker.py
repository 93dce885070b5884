"""The circuit breaker: a run in which everything fails for one reason ends, instead of recording it for every row.

Three things end it, at any time of a run and in each worker for itself: :data:`MOST_REFUSALS` requests in a row that
the engine refused for good (a key, a quota); as many images or texts in a row about which it rejected requests for one
reason (a field that it does not know, a prompt that is too long); :data:`MOST_FAILED_ROWS` rows in a row that ended in
``engine_error`` for one reason. Ids and numbers do not count in reasons; in a row means in the order of their ends.
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
    """Requests that the engine would not do since it last did one: refused for good, or rejected for one reason.

    Of those about one image or text, which may all be rejected for what that one is, only the first counts.
    """

    def __init__(self) -> None:
        self._refused = 0
        self._rejected, self._reason = set[str](), ""

    def failed(self, error: RequestError, about: str = "") -> None:
        """Raises RunFailed where that makes too many; one that may do better next time neither counts nor resets.

        ``about``: what requests about one image or text have in common.
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
