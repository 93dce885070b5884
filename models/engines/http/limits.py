"""Concurrency limit of a server: fixed, or adapted to what the server takes.

A server that refuses (429, 503, a timeout) gets fewer requests. One that answers gets more as long as larger batches
pay: with twice the requests in flight, latency must grow by less than twice. vLLM, SGLang and the like queue what they
cannot batch instead of refusing it, so latency is the only signal. Cf. TCP's congestion control: slow start, AIMD,
delay.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

START, MOST = 32, 2048  # requests in flight: initially, and the maximum for one server
LEAST_GAIN = 0.1  # share of the ideal gain in throughput that a higher limit must bring to be kept
COMPARABLE = 1.25  # limits closer than this factor are not distinguished by their latency
WARY_ROUNDS = 4  # rounds without an increase after a refusal
HOLD_ROUNDS, LONGEST_HOLD = 20, 160  # the same after an increase that brought nothing; doubled each time
HARD_CUT, SOFT_CUT = 0.5, 0.85
OTHER_FILES = 512  # file descriptors reserved for everything but a server's connections
ENOUGH_FILES = 65_536


class AdaptiveLimit:
    """The search for the limit. Pure: it is notified of outcomes and never reads a clock.

    A round is over when about half a limit's worth of the requests that began under it were answered. Requests that
    began under an earlier limit (``generation``) are ignored.
    """

    def __init__(self, start: int = START, most: int = MOST) -> None:
        self.most = most
        self.value = min(start, most)
        self.generation = 0
        self._step = self.value
        self._level: tuple[int, float] | None = None  # the last limit that paid off, with its mean latency
        self._hold, self._next_hold = 0, HOLD_ROUNDS
        self._rounds = 0  # since the last cut
        self._searching = True  # nothing was refused yet
        self._good: int | None = None  # the last limit without a refusal
        self._ceiling: int | None = None  # the limit at the last refusal
        self._probing = False
        self._begin_round()

    def full(self) -> None:
        """Called when as many requests as allowed are in flight: the limit is the bottleneck, not the demand."""
        self._full = True

    def answered(self, generation: int, seconds: float) -> None:
        """A request was answered after ``seconds``."""
        if generation != self.generation:
            return
        self._answers += 1
        self._seconds += seconds
        if self._answers >= max(self.value // 2, min(self.value, 8)):
            self._end_round(self._seconds / self._answers)

    def refused(self, generation: int) -> None:
        """A request was refused as one too many. Those sent under the same limit are covered by the same cut."""
        if generation != self.generation:
            return
        cut = HARD_CUT if self._searching or self._rounds == 0 else SOFT_CUT
        lower = max(1, min(self.value - 1, int(self.value * cut)))
        if self._good is not None and self._good < self.value:
            lower = self._good
        self._ceiling, self._good = self.value, None
        self._searching, self._rounds = False, 0
        self._level, self._step, self._hold, self._probing = None, 1, WARY_ROUNDS, False
        self._set(lower)

    def restart(self) -> None:
        """Start over with one request: the server was away."""
        self._level, self._step, self._hold, self._next_hold = None, 1, 0, HOLD_ROUNDS
        self._good, self._ceiling, self._searching, self._probing = None, None, True, False
        self._set(1)

    def _end_round(self, latency: float) -> None:
        full = self._full
        self._rounds += 1
        if not full:
            self._begin_round()
            return
        self._good = self.value
        if self._ceiling is not None and self.value >= self._ceiling:  # there is more capacity than before
            self._ceiling, self._step = None, 1
        if self._hold > 0:
            self._hold -= 1
            if self._level is None or self._level[0] == self.value:
                self._level = self.value, latency
            self._begin_round()
        elif self._level is not None and not pays(self._level, (self.value, latency)):
            self._hold, self._next_hold = self._next_hold, min(2 * self._next_hold, LONGEST_HOLD)
            self._step = max(1, self.value // 4)
            self._set(self._level[0])
        else:
            if self._level is None or self.value >= COMPARABLE * self._level[0]:
                self._level = self.value, latency
            self._raise()

    def _raise(self) -> None:
        """Increase by twice the last step, or half the way to the last refusal; from just below that only rarely."""
        if self._ceiling is not None:
            if self._ceiling - self.value == 1 and not self._probing:
                self._probing, self._hold = True, HOLD_ROUNDS
                self._begin_round()
                return
            self._probing = False
            self._step = min(self._step, max(1, (self._ceiling - self.value) // 2))
        higher = min(self.most, self.value + self._step)
        self._step = min(2 * self._step, higher)
        self._set(higher)

    def _set(self, value: int) -> None:
        self.value = value
        self.generation += 1
        self._begin_round()

    def _begin_round(self) -> None:
        self._full, self._answers, self._seconds = False, 0, 0.0


def pays(lower: tuple[int, float], higher: tuple[int, float]) -> bool:
    """Whether the higher of two (limit, mean latency) brings throughput; True where they are too close to say."""
    ratio = higher[0] / lower[0]
    if ratio < COMPARABLE:
        return True
    gain = ratio * max(lower[1], 1e-9) / max(higher[1], 1e-9)  # Little's law: throughput = in flight / latency
    return gain >= 1 + LEAST_GAIN * (ratio - 1)


@dataclass(eq=False)
class Slot:
    """One request's time at the server."""

    generation: int
    began: float


class Limiter:
    """Queue in front of a server. Requests that were refused keep their position in it.

    ``limit``: an int for a fixed one.
    """

    def __init__(self, limit: AdaptiveLimit | int) -> None:
        self._limit = limit
        self._line: list[tuple[int, int, asyncio.Future[int]]] = []
        self._sleepers: set[asyncio.Future[None]] = set()
        self._order = itertools.count()
        self._in_flight, self._turns = 0, set[Slot]()
        self._paused_until = 0.0
        self._shut: Callable[[], Exception] | None = None

    @property
    def limit(self) -> int:
        return self._limit if isinstance(self._limit, int) else self._limit.value

    @property
    def oldest(self) -> float:
        """Send time of the oldest request still at the server, in monotonic seconds; infinite without any."""
        return min((slot.began for slot in self._turns), default=float("inf"))

    @asynccontextmanager
    async def slot(self, priority: int) -> AsyncIterator[Slot]:
        """Wait for a turn; the lowest ``priority`` is next. Raises what ``shut`` was given."""
        slot = Slot(await self._enter(priority), time.monotonic())
        self._turns.add(slot)
        try:
            yield slot
        finally:
            self._turns.discard(slot)
            self._in_flight -= 1
            self._admit()

    def answered(self, slot: Slot) -> None:
        if not isinstance(self._limit, int):
            self._limit.answered(slot.generation, time.monotonic() - slot.began)

    def refused(self, slot: Slot) -> None:
        if not isinstance(self._limit, int):
            self._limit.refused(slot.generation)

    def pause(self, seconds: float) -> None:
        """Admit no request for ``seconds``, as the server asked."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
        asyncio.get_running_loop().call_later(seconds + 0.001, self._admit)  # never before the pause is over

    async def sleep(self, seconds: float) -> None:
        """Wait between two attempts. Raises what ``shut`` was given, as soon as it is called."""
        if self._shut is not None:
            raise self._shut()
        future = asyncio.get_running_loop().create_future()
        self._sleepers.add(future)
        try:
            done, _ = await asyncio.wait({future}, timeout=seconds)
            for finished in done:
                finished.result()
        finally:
            self._sleepers.discard(future)

    def shut(self, error: Callable[[], Exception]) -> None:
        """Fail all waiting and new requests, each with an ``error`` of its own."""
        self._shut = error
        waiting: list[asyncio.Future[Any]] = [*self._sleepers, *(future for _, _, future in self._line)]
        self._line.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error())

    def reopen(self) -> None:
        """Resume after ``shut``, with one request where the limit adapts."""
        self._shut, self._paused_until = None, 0.0
        if not isinstance(self._limit, int):
            self._limit.restart()

    async def _enter(self, priority: int) -> int:
        """Wait for a turn; returns the generation of the limit that admitted it, which may have changed by then."""
        if self._shut is not None:
            raise self._shut()
        if not self._line and self._free():
            return self._take()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._line, (priority, next(self._order), future))
        self._admit()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:  # it was admitted already
                self._in_flight -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        while self._line and self._free():
            future = heapq.heappop(self._line)[2]
            if not future.done():
                future.set_result(self._take())

    def _take(self) -> int:
        self._in_flight += 1
        if isinstance(self._limit, int):
            return 0
        if self._in_flight >= self.limit:
            self._limit.full()
        return self._limit.generation

    def _free(self) -> bool:
        return self._in_flight < self.limit and time.monotonic() >= self._paused_until


def room_for_connections(wanted: int) -> int:
    """How many of ``wanted`` connections this process may open, at least one; raises its soft file limit for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OTHER_FILES:
        higher = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
        if higher > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (higher, hard))
            soft = higher
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - OTHER_FILES))
