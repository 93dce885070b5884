"""Dynamic batching: calls that wait at the same time are computed together, on a separate thread."""

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
MOST = 256  # calls per batch; a model splits it further where its memory requires


def most_on(device: torch.device) -> int:
    """The maximum batch size for a model on ``device``.

    On a CPU it is 1: which calls wait together depends on timing, and sums in another order differ in their last bits,
    so only unbatched calls make a run reproduce its weights. GPU runs are not reproducible anyway, and gain more from
    batches.
    """
    return 1 if device.type == "cpu" else MOST


class DynamicBatcher(Generic[Asked, Told]):
    """Batches calls to ``compute``, which returns results in order. Where a batch fails, only the calls at fault fail.

    Use from one event loop. Results must not depend on what else is in the batch, except for float rounding.
    """

    def __init__(self, compute: Callable[[Sequence[Asked]], Sequence[Told]], most: int = MOST) -> None:
        self._compute, self._most = compute, most
        self._waiting: list[tuple[Asked, asyncio.Future[Told]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="capipe-reward")
        self._batcher: asyncio.Task[None] | None = None
        self._dead: str | None = None

    async def ask(self, asked: Asked) -> Told:
        """The result for one call. Raises its error, or EngineDead where the device is gone or this was closed."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._batcher is None or self._batcher.done():
            self._batcher = asyncio.create_task(self._answer_all())
        return await future

    async def aclose(self) -> None:
        """Let the running batch finish, fail waiting calls, free the thread."""
        self._dead = self._dead or "the reward's model was closed"
        if self._batcher is not None:
            await asyncio.gather(self._batcher, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def _answer_all(self) -> None:
        """Compute batches until no call is waiting."""
        await asyncio.sleep(0)  # lets callers that were started together queue before the first batch closes
        while self._waiting:
            jobs, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            jobs = [job for job in jobs if not job[1].done()]  # a caller may have been cancelled
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
        """One outcome per call. A failing batch is halved, down to the call at fault."""
        return by_halves(asked, self._computed)

    def _computed(self, asked: Sequence[Asked]) -> Sequence[Told | Exception]:
        if self._dead is None:
            try:
                return self._compute(asked)
            except torch.AcceleratorError as error:  # after a device fault nothing can be computed in this process
                self._dead = f"{type(error).__name__}: {error}"
        return [EngineDead(self._dead)] * len(asked)
