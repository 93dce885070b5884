"""Limit on a worker's rows in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Window:
    """A semaphore whose size may change at any time. One task acquires, any may release."""

    def __init__(self, size: Callable[[], int]) -> None:
        self._size, self._held, self._freed = size, 0, asyncio.Event()

    async def acquire(self) -> None:
        while self._held >= max(1, self._size()):
            self._freed.clear()
            await self._freed.wait()
        self._held += 1

    def release(self) -> None:
        self._held -= 1
        self._freed.set()
