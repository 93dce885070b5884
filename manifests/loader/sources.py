"""What a data set is made of: tars, each with its sidecars, by manifests alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from ...errors import ArtifactMismatch, BadInput, DamagedShard
from ..artifact import Artifact
from ..files.allowed import Allowed, open_place
from ..files.outside import Refused
from ..files.storage import refuse_irregular
from ..files.store_errors import StoreUnavailable
from ..files.stores import filesystem
from ..joining.companion import Companion
from ..joining.index_tars import is_index, tar_location
from ..manifest import ShardRecord
from ..shards import ROWS, InputShard, expand, input_artifact, join, with_companions
from ..status import Status

SHARDS = "shards"  # name of the sidecar that lists the rows of the shards themselves: beside a tar of ours, or an index


@dataclass(frozen=True)
class Source:
    """A tar and its sidecars, which have a row for each of its rows, in their order; one at least.

    ``is_own``: capipe wrote the tar. ``sound_rows``: number of rows if all of them are ok in all sidecars, by their
    manifests; else None. ``index``: the index that names the tar, and where its tars may lie.
    """

    name: str
    url: str
    sidecars: tuple[Companion, ...]
    is_own: bool
    sound_rows: int | None = None
    index: Allowed | None = None

    @property
    def listing(self) -> Companion:
        """The sidecar that says which images there are: of capipe's tars and of an index their own, which has the uids
        of the bytes in the tar; of other tars the first one."""
        return next((sidecar for sidecar in self.sidecars if sidecar.name == SHARDS), self.sidecars[0])

    def open(self) -> BinaryIO:
        """The tar. Raises DamagedShard if it cannot be opened, ArtifactMismatch if an index may not name it."""
        try:
            if self.index is not None:
                return open_place(tar_location(self.index.given, self.url, self.index))
            fs, path = filesystem(self.url)
            if fs.is_local:
                refuse_irregular(Path(path))
            return fs.open(path)
        except StoreUnavailable:
            raise
        except (OSError, Refused) as error:
            raise DamagedShard(f"{self.url}: cannot be read ({error}); restore it") from None


@dataclass(frozen=True)
class Table:
    """The sidecars of one artifact, with their columns. ``label``: the user's, of captions; "" for the only ones."""

    name: str
    artifact: Artifact
    schema: pa.Schema
    label: str | None = None


def opened(
    shards: str, captions: Mapping[str, str], scores: Sequence[str], images: Sequence[str]
) -> tuple[list[Source], list[Table]]:
    """The tars of a pattern or an index, and the artifacts that are joined with them, the shards' own listing last.

    ``captions``: artifacts by label; ``images``: folders and URLs below which the tars of an index may lie. Raises
    BadInput if an artifact lacks a shard, or if nothing lists the rows of the tars; ArtifactMismatch.
    """
    labels = {f"captions {label}".rstrip(): label for label in captions}
    named = {name: _opened("captions", captions[label]) for name, label in labels.items()}
    named |= {f"scores {number}": _opened("scores", url) for number, url in enumerate(scores, 1)}
    artifact = input_artifact(shards)
    if artifact is not None and is_index(artifact):
        sources = _of_index(artifact, named, images)
    elif images:
        raise BadInput(f"images={list(images)}: where the tars of an index lie, and {shards} is none; leave it out")
    else:
        sources = _of_tars(shards, artifact, named)
    tables = [Table(name, made, _schema(sources[0], name), labels.get(name)) for name, made in named.items()]
    if any(sidecar.name == SHARDS for sidecar in sources[0].sidecars):
        listing = artifact or Artifact.open(sources[0].url.rpartition("/")[0])
        label = "" if listing.stage == "annotate" and not captions else None  # packed captions
        tables.append(Table(SHARDS, listing, _schema(sources[0], SHARDS), label))
    return sources, tables


def _opened(option: str, url: str) -> Artifact:
    artifact = Artifact.open(url)
    if not artifact.committed():
        raise BadInput(f"{option}={url}: no shard is committed there yet; run its stage to the end first")
    return artifact


def _of_tars(pattern: str, artifact: Artifact | None, named: Mapping[str, Artifact]) -> list[Source]:
    shards = expand(pattern, artifact)
    other = next((shard for shard in shards if (shard.record is None) != (shards[0].record is None)), None)
    if other is not None:
        raise BadInput(f"{other.url} and {shards[0].url}: one is capipe's and one another tool's; ingest the latter")
    # What is beside capipe's tars is compared with their listing, which knows images that were encoded anew (rows.py).
    shards = join(shards, named) if shards[0].record is None else with_companions(shards, named)
    unsound = _unsound(named)
    return [_of_tar(shard, shard.name not in unsound) for shard in shards]


def _of_tar(shard: InputShard, is_sound: bool) -> Source:
    record, sidecars = shard.record, shard.companions
    if record is not None:
        url, sha256 = f"{shard.url.removesuffix('.tar')}.parquet", record.files[f"{shard.name}.parquet"]["sha256"]
        sidecars = (*sidecars, Companion(SHARDS, url, str(sha256), record.count, record.replaces))
        is_sound = is_sound and _is_sound(record)
    elif not sidecars:
        text = f"{shard.url}: not a tar of capipe, and nothing else lists its rows"
        raise BadInput(f"{text}; give captions= or scores= that were made of it, or shards of `capipe ingest`")
    whole = next((sidecar.rows for sidecar in sidecars if sidecar.part is None), None)
    return Source(shard.name, shard.url, sidecars, record is not None, whole if is_sound else None)


def _unsound(named: Mapping[str, Artifact]) -> set[str]:
    """Shards of which a row is not ok in one of the artifacts."""
    return {
        str(entry.get("name", record.shard))
        for artifact in named.values()
        for record in artifact.committed().values()
        if not _is_sound(record)
        for entry in record.input.get("shards", [{}])
    }


def _is_sound(record: ShardRecord) -> bool:
    return record.rows.get(Status.OK, 0) == record.count


def _of_index(index: Artifact, named: Mapping[str, Artifact], images: Sequence[str]) -> list[Source]:
    """Every original tar of an index, in order of its shards. No tar is opened."""
    allowed, entries = Allowed(index.url, tuple(images)), dict[str, Mapping[str, Any]]()
    for record in index.committed().values():
        entries |= {entry["name"]: entry for entry in record.input["shards"]}
    try:
        shards = [InputShard(name, allowed.place(entry.get("url"))) for name, entry in entries.items()]
    except Refused as error:
        raise ArtifactMismatch(f"{index.url}: an index over tars elsewhere: {error}") from None
    if not shards:
        raise BadInput(f"{index.url}: no shard is committed there yet; run `capipe filter` to the end first")
    return [
        Source(shard.name, shard.url, shard.companions, ROWS in entries[shard.name], None, allowed)
        for shard in with_companions(shards, {**named, SHARDS: index})
    ]


def _schema(source: Source, name: str) -> pa.Schema:
    """Columns of an artifact, by its sidecar of one shard."""
    sidecar = next(sidecar for sidecar in source.sidecars if sidecar.name == name)
    with reading(sidecar), sidecar.open() as parquet:
        return parquet.schema_arrow


@contextmanager
def reading(sidecar: Companion) -> Iterator[None]:
    """Errors of reading a sidecar as DamagedShard, with its URL."""
    try:
        yield
    except StoreUnavailable:
        raise
    except (OSError, KeyError, pa.ArrowException) as error:
        text = f"{sidecar.url}: cannot be read ({error}); restore it, or run its stage again with --fresh"
        raise DamagedShard(text) from None
