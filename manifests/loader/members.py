"""Images from a tar: those of wanted rows alone, in their order; the members between are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DamagedShard
from ..files.tar import without_controls
from ..samples import META_EXTENSIONS, Sample, is_image, read_samples, sidecars, split_name
from ..shards import uid_of
from ..sidecars import MAX_BYTES, MAX_OWN_BYTES, decode_meta
from ..status import Status
from .sources import Source


@dataclass(frozen=True, slots=True)
class Loaded:
    """A selected row with its image, not decoded, and the JSON that is beside it in the tar."""

    row: Mapping[str, Any]
    image: bytes
    json: dict[str, Any] | None


def load(source: Source, rows: Sequence[Mapping[str, Any]]) -> Iterator[Loaded]:
    """The ``rows`` of a shard, in its order, with their images. The tar is read forward, and no further than needed.

    Every image is compared with its row's uid. Raises DamagedShard if the tar does not hold one of them.
    """
    wanted, keys = iter(rows), {row["key"] for row in rows}
    row = next(wanted, None)
    if row is None:
        return
    with source.open() as stream:
        for sample in read_samples(stream, read_data=lambda name: _is_wanted(name, keys)):
            if sample.key != row["key"]:
                continue
            yield _loaded(source, row, sample)
            row = next(wanted, None)
            if row is None:
                return
    raise DamagedShard(f"{source.url}: has no sample {row['key']!r}, which its sidecars list; restore the tar")


def _is_wanted(name: str, keys: set[str]) -> bool:
    """True for the image and the JSON of a key; captions come from sidecars."""
    key, extension = split_name(without_controls(name.removeprefix("./")))
    return key in keys and (is_image(extension) or extension.rpartition(".")[2] in META_EXTENSIONS)


def _loaded(source: Source, row: Mapping[str, Any], sample: Sample) -> Loaded:
    image = sample.image()
    if sample.status is not Status.OK or image is None or image.data is None:
        raise DamagedShard(f"{source.url}: {row['key']!r} cannot be read ({sample.error}); restore the tar")
    if uid_of(image.data) != row["uid"]:
        text = f"{source.url}: the image of {row['key']!r} is not the one that its sidecars are of"
        raise DamagedShard(f"{text}; restore the tar, or give what was made of it")
    extension = next(extension for extension, member in sample.members.items() if member is image)
    meta = sidecars(extension, sample.members).meta
    data = None if meta is None else sample.members[meta].data
    return Loaded(row, image.data, decode_meta(data, [], MAX_OWN_BYTES if source.is_own else MAX_BYTES))
