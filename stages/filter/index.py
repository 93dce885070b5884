"""Index of a selection: the rows of its final shards without tars, over the original ones.

An index has the Parquet that final shards of the same selection have, byte by byte. Each shard's manifest line names
the tars with its images, with their sha256: :func:`indexed_samples` gives the samples that the final shards' tars would
hold, by one sequential pass over each of these tars, and refuses a tar that changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ArtifactMismatch, DamagedShard
from ...manifests.artifact import Artifact
from ...manifests.files.allowed import Allowed, open_place, split
from ...manifests.files.compressed import plain
from ...manifests.files.storage import parquet_of
from ...manifests.files.tar import Member
from ...manifests.joining.index_tars import tar_location
from ...manifests.manifest import ShardRecord
from ...manifests.samples import Sample, read_samples
from ...manifests.shards import OPEN, ROWS, InputShard, Row, to_row
from ...manifests.sidecars import MAX_BYTES, MAX_OWN_BYTES
from ...manifests.status import Status
from ...models.images.formats import HEAD_BYTES, ImageProblem, sniff
from .select import members

Numbered = tuple[int, Mapping[str, Any]]  # a row with its number in its shard


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarFacts:
    """``sha256`` and size (``bytes``) of an input shard's tar, as whoever read it recorded them."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, shard: InputShard, scored: ShardRecord) -> TarFacts:
        """Facts from the shard's manifest if it is one of ours, else from that of its scores (``scored``)."""
        if shard.record is not None:
            tar = shard.record.files[f"{shard.name}.tar"]
            return cls(str(tar["sha256"]), int(tar["bytes"]))
        try:
            return cls(str(scored.input["digest"]), int(scored.input["bytes"]))
        except (KeyError, TypeError, ValueError):
            text = f"{shard.url}: its scores do not say of which bytes they are, so an index could not tell"
            raise ArtifactMismatch(f"{text} if it changed; leave out --index, or score it again") from None


class ListedRows:
    """Rows of an input shard from its sidecars alone, with :attr:`info` as from a RowReader; no image is read."""

    def __init__(self, shard: InputShard, tar: TarFacts) -> None:
        self.shard, self._tar = shard, tar
        self._open: list[int] = []

    @property
    def info(self) -> dict[str, Any]:
        """The input entry for the output's manifest, complete after the iteration."""
        shard = self.shard
        info: dict[str, Any] = {"url": shard.url, "digest": self._tar.sha256, "bytes": self._tar.bytes}
        if shard.record is not None:
            info[ROWS] = shard.record.files[f"{shard.name}.parquet"]["sha256"]
        info["companions"] = {companion.name: companion.sha256 for companion in shard.companions}
        return {**info, OPEN: self._open} if self._open else info

    def __iter__(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Rows of the sidecars by name. Raises ArtifactMismatch if these are not of the same images."""
        names = [companion.name for companion in self.shard.companions]
        for index, rows in enumerate(zip(*self.shard.companions, strict=True)):
            if len({(row["key"], row["uid"]) for row in rows}) > 1:
                urls = " and ".join(companion.url for companion in self.shard.companions)
                raise ArtifactMismatch(f"{urls}: row {index} is of another image; give what was made of these shards")
            if any(not Status(row["status"]).resolved for row in rows):
                self._open.append(index)
            yield dict(zip(names, rows, strict=True))


# --- reading ----------------------------------------------------------------------------------------------------------


def indexed_samples(
    index: Artifact, record: ShardRecord, rows: Iterator[Numbered], images: Sequence[str] = ()
) -> Iterator[tuple[int, Mapping[str, Any], Sample]]:
    """The ok ``rows`` of an index's shard, each with the sample that a tar of the shard would hold; in order.

    Iterate to the end: only then are the tars' bytes verified. A tar of which no row was selected is not opened.
    ``images``: folders and URLs below which tars may be read.
    Raises ArtifactMismatch if a tar is not the one that the index was made over, BadInput if it is in another store.
    """
    for entry, group in _by_tar(record, rows):
        yield from _of_tar(index, entry, group, Allowed(index.url, tuple(images)))


def _by_tar(record: ShardRecord, rows: Iterator[Numbered]) -> Iterator[tuple[Mapping[str, Any], Iterator[Numbered]]]:
    entries = {entry["name"]: entry for entry in record.input["shards"]}
    for name, group in groupby(rows, lambda numbered: numbered[1]["source_shard"]):
        yield entries[name], group


def _of_tar(
    index: Artifact, entry: Mapping[str, Any], rows: Iterator[Numbered], allowed: Allowed
) -> Iterator[tuple[int, Mapping[str, Any], Sample]]:
    location, digest = tar_location(index.url, entry["url"], allowed), hashlib.sha256()
    most = MAX_OWN_BYTES if ROWS in entry else MAX_BYTES
    with open_place(location) as stream:
        wanted = next(rows, None)
        for sample in read_samples(stream, digest=digest):
            if wanted is None or sample.key != wanted[1]["source_key"]:
                continue
            number, row = wanted
            source = to_row(number, sample, most)
            if source.uid != row["uid"] or source.status is not Status.OK:
                raise _changed(index, location, f"the image of {sample.key!r} is another one")
            yield number, row, _as_final(source, row)
            wanted = next(rows, None)
    if wanted is not None:
        raise _changed(index, location, f"it has no {wanted[1]['source_key']!r}")
    if digest.hexdigest() != entry["digest"]:
        raise _changed(index, location, "its bytes are others")


def _changed(index: Artifact, where: str, how: str) -> ArtifactMismatch:
    text = f"{where}: changed since {index.url}, an index over it, was made ({how})"
    return DamagedShard(f"{text}; restore it, or score and select anew")


def _as_final(source: Row, row: Mapping[str, Any]) -> Sample:
    """The sample of a final shard's tar, from its row and the original sample."""
    parts = members(source, row) or {}
    named = {
        extension: Member(f"{row['key']}.{extension}", 0, len(data), data=data) for extension, data in parts.items()
    }
    return Sample(row["key"], named)


def indexed_extensions(
    index: Artifact, record: ShardRecord, rows: Iterator[Numbered], images: Sequence[str] = ()
) -> set[str]:
    """Extensions of the images that :func:`indexed_samples` would give.

    From the ``format`` of ingested rows, else from the images' first bytes, for which tars' headers are read.
    """
    extensions: set[str] = set()
    for entry, group in _by_tar(record, rows):
        location = tar_location(index.url, entry["url"], Allowed(index.url, tuple(images)))
        keys = {row["source_key"] for _, row in group}
        formats = _listed_formats(index, entry, location, keys)
        extensions |= _seen_formats(location, keys) if formats is None else formats
    return extensions


def _listed_formats(index: Artifact, entry: Mapping[str, Any], location: str, keys: Collection[str]) -> set[str] | None:
    """Formats by the Parquet beside a tar of ours; None if there is none with formats."""
    if ROWS not in entry:
        return None
    folder, file = split(f"{location.removesuffix('.tar')}.parquet")
    try:
        data = folder.read_bytes(file)
    except OSError:  # moved without its tar: the tar has all that is needed
        return None
    if hashlib.sha256(data).hexdigest() != entry[ROWS]:
        raise _changed(index, f"{folder.url}/{file}", "its bytes are others")
    with parquet_of(data) as listed:
        if "format" not in listed.schema_arrow.names:
            return None
        table = listed.read(columns=["key", "format"], use_threads=False)
    wanted = pc.is_in(table.column("key"), pa.array(keys, pa.string()))
    return set(table.filter(wanted).column("format").to_pylist())


def _seen_formats(location: str, keys: Collection[str]) -> set[str]:
    with plain(open_place(location)) as stream:
        places = [
            (image.offset, _extension(sample, image))
            for sample in read_samples(stream, read_data=False)
            if sample.key in keys and (image := sample.image()) is not None
        ]
        return {_format_at(stream, offset, extension) for offset, extension in places}


def _extension(sample: Sample, image: Member) -> str:
    return next(extension for extension, member in sample.members.items() if member is image)


def _format_at(stream: BinaryIO, offset: int, extension: str) -> str:
    """Format of the image at an offset, as :func:`.select.members` names it."""
    stream.seek(offset)
    seen = sniff(stream.read(HEAD_BYTES))
    return extension if isinstance(seen, ImageProblem) else seen
