"""Model inputs for the examples' images, each read and decoded once for all captions sampled or scored."""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import RunFailed
from ..models.engines.base import ImageInput
from ..models.images.decode import EVERYTHING, ImageLimits
from ..models.images.decode_pool import DecodePool, grid_decoder
from ..models.images.formats import ImageProblem
from ..models.images.grid import ImageGrid
from .dataset import Example

KEPT = 256  # images in the cache; more than a step of one process has


class Pictures:
    """Images resized to ``grid``; without one, the original bytes, for servers. ``processes``: decoding processes.

    ``lossless``: send a PNG of the pixels, so that a server gets the same pixels as the policy here.
    """

    def __init__(self, grid: ImageGrid | None, processes: int = 1, lossless: bool = False) -> None:
        self._lossless = lossless
        self._pool = None if grid is None else DecodePool(processes, grid_decoder(grid, ImageLimits(accept=EVERYTHING)))
        self._recent: OrderedDict[str, asyncio.Task[ImageInput]] = OrderedDict()

    async def of(self, example: Example) -> ImageInput:
        """Image of an example. Raises RunFailed if it was valid when listed but cannot be decoded any more."""
        if example.uid not in self._recent:
            self._recent[example.uid] = asyncio.create_task(self._read(example))
            if len(self._recent) > KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(example.uid)
        return await asyncio.shield(self._recent[example.uid])

    async def _read(self, example: Example) -> ImageInput:
        data = await asyncio.to_thread(example.read)
        pixels = None if self._pool is None else await self._pool.decode(data)
        if isinstance(pixels, ImageProblem):
            raise RunFailed(
                f"{example.url}: {example.key!r} cannot be decoded: {pixels.reason}; leave it out by `capipe qa`"
            )
        if pixels is not None and self._lossless:
            data = await asyncio.to_thread(_png, pixels)
        return ImageInput(example.uid, pixels=pixels, encoded=data)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()
