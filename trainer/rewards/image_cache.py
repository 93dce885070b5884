"""Preprocessed images for a scoring model, each read and decoded once for all of its captions."""

from __future__ import annotations

import asyncio
import functools

from ...errors import RunFailed
from ...models.images.decode import EVERYTHING, ImageLimits, Pixels
from ...models.images.decode_pool import DecodePool
from ...models.images.formats import ImageProblem
from ...models.images.preprocess import Preprocess, decode_preprocessed
from ...models.lru_cache import LRUCache
from ..dataset import Example

KEPT = 256  # images in the cache; more than a step of one process has
_LIMITS = ImageLimits(accept=EVERYTHING)  # images were valid for the stage that listed them


class ImageCache:
    """Images after ``preprocess``, decoded in a separate process. Use from one event loop."""

    def __init__(self, preprocess: Preprocess) -> None:
        decode = functools.partial(decode_preprocessed, preprocesses=(preprocess,), limits=_LIMITS)
        self._pool: DecodePool[tuple[Pixels, ...]] = DecodePool(1, decode)
        self._recent: LRUCache[str, asyncio.Task[Pixels]] = LRUCache(KEPT)

    async def of(self, example: Example) -> Pixels:
        """Pixels, (height, width, 3) uint8. Raises RunFailed if an image valid when listed cannot be decoded."""
        reading = self._recent.get(example.uid)
        if reading is None:
            reading = asyncio.create_task(self._read(example))
            self._recent.put(example.uid, reading)
        try:
            return await asyncio.shield(reading)
        except Exception:
            self._recent.drop(example.uid)  # the next caption tries again
            raise

    async def _read(self, example: Example) -> Pixels:
        views = await self._pool.decode(await asyncio.to_thread(example.read))
        if isinstance(views, ImageProblem):
            raise RunFailed(f"{example.url}: {example.key!r} cannot be decoded: {views.reason}")
        return views[0]

    def close(self) -> None:
        self._pool.close()
