"""Calls that wait at the same time are computed together, on a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from .engines.base import EngineDead
from .halving import by_halves

Asked = TypeVar("Asked")
Told = TypeVar("Told")
MOST = 256  # calls in a batch; a model cuts it further where its memory asks for that


def most_on(device: torch.device) -> int:
    """How many calls a model on ``device`` is to compute at once.

    On a CPU one: which calls wait together is chance, and sums in another order differ in their last bits; so a run
    gives the same weights again. On a GPU, where it would not anyway, batches are worth more.
    """
    return 1 if device.type == "cpu" else MOST


class DynamicBatcher(Generic[Asked, Told]):
    """``compute`` answers a batch of calls, in order. Where it fails on one, only the calls that are to blame fail.

    Use from one event loop. What is computed must not depend on what else is in the batch, but for float rounding.
    """

    def __init__(self, compute: Callable[[Sequence[Asked]], Sequence[Told]], most: int = MOST) -> None:
        self._compute, self._most = compute, most
        self._waiting: list[tuple[Asked, asyncio.Future[Told]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="capipe-reward")
        self._batcher: asyncio.Task[None] | None = None
        self._dead: str | None = None

    async def ask(self, asked: Asked) -> Told:
        """What ``compute`` tells of it. Raises what that raised, EngineDead where the device is gone or this closed."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._batcher is None or self._batcher.done():
            self._batcher = asyncio.create_task(self._answer_all())
        return await future

    async def aclose(self) -> None:
        """Let the running batch end, fail what waits, free the thread."""
        self._dead = self._dead or "the reward's model was closed"
        if self._batcher is not None:
            await asyncio.gather(self._batcher, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def _answer_all(self) -> None:
        """Batch after batch until nobody waits."""
        await asyncio.sleep(0)  # callers that were started together get to queue before the first batch closes
        while self._waiting:
            jobs, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            jobs = [job for job in jobs if not job[1].done()]  # a caller may have gone away
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._results, [job[0] for job in jobs]
            )
            for (_, future), outcome in zip(jobs, results, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    def _results(self, asked: Sequence[Asked]) -> list[Told | Exception]:
        """One outcome per call. Where a batch fails its halves are tried, down to the call that is to blame."""
        return by_halves(asked, self._computed)

    def _computed(self, asked: Sequence[Asked]) -> Sequence[Told | Exception]:
        if self._dead is None:
            try:
                return self._compute(asked)
            except torch.AcceleratorError as error:  # a faulted device computes nothing any more in this process
                self._dead = f"{type(error).__name__}: {error}"
        return [EngineDead(self._dead)] * len(asked)
