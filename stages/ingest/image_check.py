"""Check of every ingested image: in this process or, where that is not safe, in a separate one."""

from __future__ import annotations

import functools
from types import TracebackType

from ...manifests.status import Status
from ...models.images.decode import ImageInfo, ImageLimits, check
from ...models.images.decode_pool import Decoder
from ...models.images.encoding import Encoding
from ...models.images.formats import ImageProblem


class ImageCheck:
    """:func:`...models.images.decode.check` under ``limits``, with ``encoding``; a context manager.

    ``careful``: decode every image in a process of its own; by default only one for which memory ran out here. If that
    fails as well, the image is a ``read_error``.
    """

    def __init__(self, limits: ImageLimits, careful: bool = False, encoding: Encoding | None = None) -> None:
        self._check, self._careful = functools.partial(check, limits=limits, encoding=encoding), careful
        self._decoder: Decoder[ImageInfo] | None = None

    def __call__(self, data: bytes) -> ImageInfo | ImageProblem:
        if not self._careful:
            try:
                verdict = self._check(data)
            except MemoryError:
                verdict = None
            if verdict is not None and not (isinstance(verdict, ImageProblem) and verdict.status is Status.READ_ERROR):
                return verdict
        if self._decoder is None:
            self._decoder = Decoder(self._check)
            self._decoder.await_start()
        return self._decoder.alone(data)[0]

    def __enter__(self) -> ImageCheck:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._decoder is not None:
            self._decoder.kill()
