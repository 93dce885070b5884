"""Random access to single images in tars; thumbnails."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from PIL import Image

from ...errors import CapipeError, RunFailed
from ...manifests.files.allowed import Allowed, open_place, stamp_of
from ...manifests.files.compressed import plain
from ...manifests.files.outside import Refused, is_url
from ...manifests.files.stores import impatient
from ...manifests.files.tar import printable
from ...manifests.samples import read_samples
from ...manifests.status import Status
from ...models.images.decode import EVERYTHING, ImageLimits, thumbnail
from ...models.images.formats import ImageProblem
from ...stages.reading.faults import read_problem
from .shard_join import ShardJoin, ShardName

OPEN_TARS = 16
PATIENCE = 1.0  # seconds for passing errors of a store
LIMITS = ImageLimits(min_side=1, accept=EVERYTHING)
Key = TypeVar("Key")
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """LRU cache, limited to ``budget`` as measured by ``weigh``; thread-safe."""

    def __init__(self, budget: int, weigh: Callable[[Value], int] = lambda _: 1) -> None:
        self._budget, self._weigh, self._weight = budget, weigh, 0
        self._held: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        return None

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            if key in self._held:
                self._weight -= self._weigh(self._held.pop(key))
            self._held[key] = value
            self._weight += self._weigh(value)
            while self._weight > self._budget and len(self._held) > 1:
                _, old = self._held.popitem(last=False)
                self._weight -= self._weigh(old)


class TarImages:
    """Images of one tar, by key. Headers are read only as far as needed, other members' data never."""

    def __init__(self, open_tar: Callable[[], BinaryIO]) -> None:
        self._open, self._lock = open_tar, threading.Lock()
        self._samples = read_samples(open_tar(), read_data=False)  # closed with the last reference to it
        self._places: dict[str, tuple[int, int]] = {}

    def read(self, key: str) -> bytes | None:
        """Bytes of an image; None if the tar has no sound image of this key. Raises OSError."""
        extent = self._find(key)
        if extent is None:
            return None
        with plain(self._open()) as stream:
            stream.seek(extent[0])
            data = stream.read(extent[1])
        return data if len(data) == extent[1] else None

    def _find(self, key: str) -> tuple[int, int] | None:
        with self._lock:
            while key not in self._places:
                sample = next(self._samples, None)
                if sample is None:
                    return None
                image = sample.image()
                if sample.status is Status.OK and image is not None:
                    self._places[sample.key] = image.offset, image.size
            return self._places[key]


class RowImages:
    """Images of artifacts' rows, from any tar that may hold them and that ``allowed`` permits.

    ``refused``: distinct reasons for images that were left out.
    """

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._tars: Cache[tuple[str, tuple[int, int]], TarImages] = Cache(OPEN_TARS)
        self._lock = threading.Lock()
        self.refused: list[str] = []

    def of(self, join: ShardJoin, shard_name: ShardName, row: Mapping[str, Any]) -> bytes | None:
        """Image of a row (``key``; in final shards also ``source_shard``, ``source_key``); None without one."""
        tars = [(tar, str(row["key"])) for tar in join.tars(shard_name)]
        selected = join.selected_from(shard_name)
        if selected is not None and row.get("source_shard") is not None:
            tars += [(tar, str(row["source_key"])) for tar in join.sources(selected, str(row["source_shard"]))]
        reason = None
        for tar, key in tars:
            try:
                if (data := self._read(self._allowed.place(tar.location), key)) is not None:
                    return data
            except Refused as error:
                reason = reason or str(error)
        for tar, key in tars:
            for location in self._allowed.elsewhere(tar.location) if tar.size is not None else ():
                try:
                    if (data := self._read(location, key, tar.size)) is not None:
                        return data
                except Refused as error:
                    reason = reason or str(error)
        if reason is not None and reason not in self.refused:
            self.refused.append(reason)
        return None

    def refusal(self, join: ShardJoin, shard_name: ShardName) -> str | None:
        """Reason for not showing a shard's images, if none of their tars may be read; opens nothing."""
        reason = None
        for tar in join.tars(shard_name):
            try:
                location = self._allowed.place(tar.location)
            except Refused as error:
                reason = reason or str(error)
                continue
            if is_url(location) or Path(location).exists():
                return None
        return None if self._allowed.named else reason

    def _read(self, location: str, key: str, size: int | None = None) -> bytes | None:
        """An image; None if it is missing, or the tar's size is not ``size``. Raises Refused for a tar that is not a
        regular file, or in an unreachable store."""
        try:
            with impatient(PATIENCE):
                tar = self._tar(location, size)
                return None if tar is None else tar.read(key)
        except ValueError:  # replaced meanwhile
            return None
        except Exception as error:
            problem = read_problem(error)
            if problem is None and not isinstance(error, CapipeError):
                raise
            # fsspec also reports an unreachable server as a missing file; at a guessed location it may be just that
            tried = isinstance(error, FileNotFoundError) and size is not None
            missing = problem is not None and problem.status is Status.MISSING
            if is_url(location) and not tried and not missing:
                said = error if problem is None else problem.reason
                raise Refused(f"{printable(location[:200])}: {printable(str(said)[:200])}") from None
            return None

    def _tar(self, location: str, size: int | None) -> TarImages | None:
        """The tar, reopened if the file was replaced."""
        stamp = stamp_of(location)
        if size not in (None, stamp[0]):
            return None
        with self._lock:
            known = self._tars.get((location, stamp))
            if known is None:
                known = TarImages(lambda: open_place(location))
                self._tars.put((location, stamp), known)
        return known


def refusals(refused: Sequence[str]) -> str | None:
    """One-line summary of :attr:`RowImages.refused`."""
    if not refused:
        return None
    more = f" (and {len(refused) - 1} more such places)" if len(refused) > 1 else ""
    return f"not shown: {refused[0]}{more}"


def small_jpeg(data: bytes, side: int, quality: int = 80) -> bytes | None:
    """JPEG thumbnail of at most ``side`` x ``side`` pixels; None if the image cannot be decoded, or not here."""
    try:
        whole = thumbnail(data, LIMITS, side)
    except RunFailed:  # by a package that is not installed
        return None
    if isinstance(whole, ImageProblem):
        return None
    image = whole.image
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
