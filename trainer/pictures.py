"""The images of tasks as models take them, each read and decoded once for all captions that are drawn or judged."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from ..errors import RunFailed
from ..models.decode import DecodePool
from ..models.engine import ImageGrid, ImageInput
from ..models.formats import ImageProblem
from ..models.images import ImageLimits
from .tasks import Task

KEPT = 256  # images; more than a step has on one process


class Pictures:
    """Images on ``grid``; without one as the bytes they came as, for servers. Holds ``processes`` that decode."""

    def __init__(self, grid: ImageGrid | None, processes: int = 1) -> None:
        self._pool = None if grid is None else DecodePool(processes, grid, ImageLimits())
        self._recent: OrderedDict[str, asyncio.Task[ImageInput]] = OrderedDict()

    async def of(self, task: Task) -> ImageInput:
        """The task's image. Raises RunFailed where one that was fine when listed cannot be decoded any more."""
        if task.uid not in self._recent:
            self._recent[task.uid] = asyncio.create_task(self._read(task))
            if len(self._recent) > KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(task.uid)
        return await asyncio.shield(self._recent[task.uid])

    async def _read(self, task: Task) -> ImageInput:
        data = await asyncio.to_thread(task.read)
        pixels = None if self._pool is None else await self._pool.decode(data)
        if isinstance(pixels, ImageProblem):
            raise RunFailed(f"{task.url}: {task.key!r} cannot be decoded: {pixels.reason}; leave it out by `capipe qa`")
        return ImageInput(task.uid, pixels=pixels, encoded=data)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
