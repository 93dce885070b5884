"""Single images out of tars, without reading the rest of them; and small copies of images to show."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Generic, TypeVar

from PIL import Image

from ..manifests.compressed import plain
from ..manifests.samples import read_samples
from ..manifests.status import Status
from ..manifests.storage import Folder
from ..models.formats import ImageProblem
from ..models.images import ImageLimits, thumbnail
from .joins import Joins, Place

OPEN_TARS = 16
LIMITS = ImageLimits(min_side=1)
Key = TypeVar("Key")
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """What was used last, up to ``budget`` by ``weigh``; safe to share between threads."""

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
    """The images of one tar by key. Its headers are read only as far as was needed so far, and never its data."""

    def __init__(self, open_tar: Callable[[], BinaryIO]) -> None:
        self._open, self._lock = open_tar, threading.Lock()
        self._samples = read_samples(open_tar(), read_data=False)  # closed with the last reference to it
        self._places: dict[str, tuple[int, int]] = {}

    def read(self, key: str) -> bytes | None:
        """An image's bytes, None where the tar has no sound image of that key. Raises OSError."""
        place = self._find(key)
        if place is None:
            return None
        with plain(self._open()) as stream:
            stream.seek(place[0])
            data = stream.read(place[1])
        return data if len(data) == place[1] else None

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


class Pictures:
    """Images of artifacts' rows, wherever among their tars these lie."""

    def __init__(self) -> None:
        self._tars: Cache[tuple[str, str, str], TarImages] = Cache(OPEN_TARS)
        self._lock = threading.Lock()

    def of(self, joins: Joins, place: Place, row: Mapping[str, Any]) -> bytes | None:
        """The image of a row (``key``, and of final shards ``source_shard``, ``source_key``); None without one."""
        for folder, file in joins.tars(place):
            if (data := self._read(folder, file, str(row["key"]))) is not None:
                return data
        selected = joins.selected_from(place)
        if selected is not None and row.get("source_shard") is not None:
            for folder, file in joins.sources(selected, str(row["source_shard"])):
                if (data := self._read(folder, file, str(row["source_key"]))) is not None:
                    return data
        return None

    def _read(self, folder: str, file: str, key: str) -> bytes | None:
        try:
            return self._tar(folder, file).read(key)
        except (OSError, ValueError, ImportError):  # gone, unreadable, replaced, or in a store without a driver
            return None

    def _tar(self, folder: str, file: str) -> TarImages:
        """The tar, opened anew where it is another one by now."""
        place = Folder(folder)
        stamp = str(place.local(file).stat().st_mtime_ns if place.is_local else place.size(file))
        with self._lock:
            known = self._tars.get((folder, file, stamp))
            if known is None:
                known = TarImages(lambda: place.open(file))
                self._tars.put((folder, file, stamp), known)
        return known


def small_jpeg(data: bytes, side: int, quality: int = 80) -> bytes | None:
    """A JPEG of at most ``side`` x ``side`` pixels; None where the image cannot be decoded."""
    whole = thumbnail(data, LIMITS, side)
    if isinstance(whole, ImageProblem):
        return None
    image = whole.image
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
