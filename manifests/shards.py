"""Input shards: rows from the tars a user names, whether written by capipe or by other tools.

A shard of ours has a Parquet beside it that lists every row, failures included; these are then the rows, in that order,
and the tar supplies the images. Rows of a foreign tar are its samples, with uids computed while reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ArtifactMismatch, BadInput, CapipeError, DamagedShard
from .artifact import Artifact
from .files.compressed import tar_stem
from .files.patterns import braced, is_pattern
from .files.storage import expecting, open_parquet, refuse_irregular
from .files.stores import filesystem
from .joining.companion import Companion, companions_of
from .manifest import ShardRecord
from .samples import Sample, read_samples, sidecars
from .sidecars import MAX_BYTES, MAX_OWN_BYTES, read_sidecars
from .status import Status

ROWS = "rows"  # key of a shard's input in the manifest: sha256 of the Parquet beside its tar
OPEN = "open"  # likewise: indices of the rows with a companion row that was to be tried again
_START_OVER = "use another --out, or --fresh to start over"


@dataclass(slots=True)
class Row:
    """One input row. ``image`` is set exactly if ``status`` is ok; ``error`` may contain a note even then."""

    index: int
    key: str
    uid: str | None
    status: Status
    error: str | None = None
    image: bytes | None = field(default=None, repr=False)
    format: str = ""
    text: str | None = None
    meta: dict[str, Any] | None = None
    beside: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)  # rows of companions, by companion name
    offset: int = -1  # of the image's bytes in its tar


@dataclass(frozen=True)
class InputShard:
    """A tar to read. ``record``: its manifest line if it belongs to an artifact of ours."""

    name: str
    url: str
    record: ShardRecord | None = None
    companions: tuple[Companion, ...] = ()

    @property
    def is_shared(self) -> bool:
        """True if other processes can read it."""
        return not self.url.startswith("memory:")

    def open(self) -> BinaryIO:
        fs, path = filesystem(self.url)
        if self.record is not None and fs.is_local:
            refuse_irregular(Path(path))
        return fs.open(path)

    def listing(self) -> pq.ParquetFile:
        """The Parquet beside a tar of ours. Raises ArtifactMismatch if its rows differ from the manifest."""
        url = self.url.removesuffix(".tar") + ".parquet"
        return expecting(open_parquet(url), 0 if self.record is None else self.record.count, url)

    def statuses(self) -> list[str]:
        """The status of each row in that Parquet. Raises as :meth:`listing`."""
        with self.listing() as parquet:
            statuses: list[str] = parquet.read(columns=["status"], use_threads=False).column("status").to_pylist()
        return statuses

    def is_repaired(self, made: ShardRecord) -> bool:
        """True if some of its rows were redone since ``made`` was made from it; the others are unchanged.

        Raises ArtifactMismatch if this is not the tar that ``made`` came from: by size, or by our manifest.
        """
        if self.record is None:
            fs, path = filesystem(self.url)
            if fs.size(path) != made.input["bytes"]:
                raise self._changed()
            return False
        tar, rows = (self.record.files[f"{self.name}.{kind}"]["sha256"] for kind in ("tar", "parquet"))
        was = made.input["digest"], made.input.get(ROWS, rows)
        if was == (tar, rows):
            return False
        if not {*was} <= {tar, rows, *self.record.replaces}:
            raise self._changed()
        return True

    def _changed(self) -> ArtifactMismatch:
        return ArtifactMismatch(f"{self.url}: the shard changed since this output was made; {_START_OVER}")

    def has_repaired_companions(self, made: ShardRecord) -> bool:
        """The same for its sidecars. Raises ArtifactMismatch if one is not the one that ``made`` was made from."""
        repaired = False
        for companion in self.companions:
            was = made.input.get("companions", {}).get(companion.name)
            if was not in (companion.sha256, *companion.replaces):
                raise ArtifactMismatch(f"{companion.url}: changed since this output was made; {_START_OVER}")
            repaired |= was != companion.sha256
        return repaired


def uid_of(image: bytes) -> str:
    """The identity of an image across datasets: the first 32 hex digits of the sha256 of its bytes."""
    return hashlib.sha256(image).hexdigest()[:32]


def expand(pattern: str, artifact: Artifact | None = None) -> list[InputShard]:
    """The shards that ``pattern`` names: an artifact or folder, a glob, ``{000..099}.tar``, one tar; any fsspec URL.

    ``artifact``: the one that the pattern names, if it is open already; its manifest is then not read again.
    Raises BadInput if a named shard is missing, nothing matches, or two shards have the same name.
    """
    if artifact is not None and not is_pattern(pattern):
        return _artifact_shards(artifact)
    fs, path = filesystem(pattern)
    if is_pattern(pattern):
        urls = [url for part in braced(pattern) for url in _glob(part)]
    elif fs.isdir(path):
        if Artifact.exists(pattern):
            return _artifact_shards(Artifact.open(pattern))
        urls = [url for url in _glob(f"{pattern.rstrip('/')}/*") if tar_stem(url) is not None]
    elif fs.exists(path):
        urls = [pattern]
    else:
        raise BadInput(f"{pattern}: no such file or folder; --shards takes a folder, a glob or {{00000..00099}}.tar")
    if not urls:
        raise BadInput(f"{pattern}: no .tar in it; `capipe ingest` makes shards of other things")
    shards = _shards(urls)
    _refuse_namesakes(shards)
    return shards


def read_places(pattern: str, shards: Iterable[InputShard], beside: Iterable[Artifact] = ()) -> list[str]:
    """Inputs of a stage, for :func:`refuse_overwriting`: the folder or tar of ``pattern``, all tars, artifacts."""
    named = [] if is_pattern(pattern) else [pattern]
    return [*named, *(shard.url for shard in shards), *(artifact.url for artifact in beside)]


def input_artifact(pattern: str) -> Artifact | None:
    """The artifact that ``pattern`` names, if it is one of ours as a whole."""
    return Artifact.open(pattern) if Artifact.exists(pattern) else None


def join(shards: list[InputShard], artifacts: Mapping[str, Artifact]) -> list[InputShard]:
    """The shards joined with rows of artifacts, by the names used in :attr:`Row.beside`.

    Raises BadInput if an artifact lacks a shard, ArtifactMismatch if one has another number of rows or the first begins
    with another image; the other rows are compared when they are read.
    """
    joined = with_companions(shards, artifacts)
    for shard in joined[:1] if artifacts else ():
        _refuse_other_images(shard)
    return joined


def with_companions(shards: list[InputShard], artifacts: Mapping[str, Artifact]) -> list[InputShard]:
    """:func:`join` by manifests alone: nothing is opened, so no row is compared yet."""
    joined = []
    sidecars = {name: companions_of(name, artifact) for name, artifact in artifacts.items()}
    for shard in shards:
        companions = []
        for name, artifact in artifacts.items():
            companion = sidecars[name].get(shard.name)
            if companion is None:
                raise BadInput(
                    f"{artifact.url}: has no shard {shard.name} for {shard.url}; finish its run, or narrow --shards"
                )
            count = companion.rows if shard.record is None or companion.part is not None else shard.record.count
            if companion.rows != count:
                text = f"{companion.url}: {companion.rows:,} rows, and {count:,} in {shard.url}"
                raise ArtifactMismatch(f"{text}; it was not made of these shards: give --shards those it was made of")
            companions.append(companion)
        joined.append(replace(shard, companions=tuple(companions)))
    return joined


def _refuse_other_images(shard: InputShard) -> None:
    """Raise ArtifactMismatch if a sidecar begins with another image. Damaged files are found when they are read."""
    try:
        row = next(iter(RowReader(replace(shard, companions=()))), None)
        begins = [(companion, companion.first()) for companion in shard.companions]
    except (CapipeError, OSError, pa.ArrowException):
        return
    for companion, first in begins:
        if row is not None and first != (row.key, row.uid):
            raise _other_image(companion, row, first)


def _artifact_shards(artifact: Artifact) -> list[InputShard]:
    records = artifact.committed()
    missing = next((r.shard for r in records.values() if f"{r.shard}.tar" not in r.files), None)
    if missing is not None:
        kind, advice = f"artifact of stage {artifact.stage!r}", "point --shards at its images"
        if artifact.stage == "select":
            kind, advice = "index", f"`capipe export` reads it; other commands take {artifact.config['run']['shards']}"
        raise BadInput(f"{artifact.url}: an {kind} without tars: {advice}")
    if not records:
        raise BadInput(f"{artifact.url}: no shard is committed there yet; run its stage to the end first")
    return [InputShard(name, f"{artifact.url}/{name}.tar", record) for name, record in records.items()]


def _shards(urls: list[str]) -> list[InputShard]:
    """Single tars; those in an artifact of ours have their manifest lines."""
    records: dict[str, dict[str, ShardRecord] | None] = {}  # by folder: each is read once
    shards = []
    for url in urls:
        folder, _, file = url.rpartition("/")
        name = tar_stem(file) or file
        if folder not in records:
            records[folder] = Artifact.open(folder).committed() if folder and Artifact.exists(folder) else None
        committed = records[folder]
        if committed is not None and (name not in committed or file != f"{name}.tar"):
            raise BadInput(f"{url}: this shard was never committed; run the stage that writes it again")
        shards.append(InputShard(name, url, committed[name] if committed is not None else None))
    return shards


def _glob(url: str) -> list[str]:
    """URLs matching ``url``, sorted. A name without wildcards must exist: a gap in a range is an error."""
    fs, path = filesystem(url)
    if not any(c in url for c in "*?["):
        if not fs.exists(path):
            raise BadInput(f"{url}: no such shard; narrow the pattern to those that exist, or restore it")
        return [url]
    return [fs.unstrip(found) if "://" in url else found for found in sorted(fs.glob(path))]


def _refuse_namesakes(shards: list[InputShard]) -> None:
    by_name: dict[str, str] = {}
    for shard in shards:
        if shard.name in by_name:
            raise BadInput(f"{shard.url} and {by_name[shard.name]} share a name; caption them in separate runs")
        by_name[shard.name] = shard.url


class SizedDigest:
    """sha256 that also counts bytes."""

    def __init__(self) -> None:
        self._sha, self.size = hashlib.sha256(), 0

    def update(self, data: bytes, /) -> None:
        self._sha.update(data)
        self.size += len(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


class RowReader:
    """Iterates over a shard's rows once; afterwards :attr:`info` is the input entry for the output's manifest."""

    def __init__(self, shard: InputShard) -> None:
        self.shard = shard
        self._digest = SizedDigest()
        self._open: list[int] = []

    @property
    def info(self) -> dict[str, Any]:
        """``digest``: sha256 of the tar, known after the iteration; ``companions``: sha256 of each companion."""
        info = {"url": self.shard.url, "digest": self._digest.hexdigest(), "bytes": self._digest.size}
        beside = {companion.name: companion.sha256 for companion in self.shard.companions}
        if self.shard.record is not None:
            info[ROWS] = self.shard.record.files[f"{self.shard.name}.parquet"]["sha256"]
        if beside:
            info["companions"] = beside
        if self._open:
            info[OPEN] = self._open
        return info

    def __iter__(self) -> Iterator[Row]:
        rows = self._rows()
        for companion in self.shard.companions:
            rows = _with_companion(rows, companion)
        for row in rows:
            if any(not Status(other["status"]).resolved for other in row.beside.values()):
                self._open.append(row.index)
            yield row

    def _rows(self) -> Iterator[Row]:
        with self.shard.open() as stream:
            samples = read_samples(stream, digest=self._digest)
            if self.shard.record is None:
                for index, sample in enumerate(samples):
                    yield to_row(index, sample)
            else:
                yield from _listed_rows(self.shard, samples)
                self._check_digest()

    def _check_digest(self) -> None:
        record = self.shard.record
        if record is None:
            return
        expected = record.files[f"{self.shard.name}.tar"]["sha256"]
        if self._digest.hexdigest() != expected:
            text = f"{self.shard.url}: its bytes are not those its manifest lists; `capipe verify` says what is wrong"
            raise DamagedShard(text)


def _listed_rows(shard: InputShard, samples: Iterator[Sample]) -> Iterator[Row]:
    """Rows as the Parquet lists them, with images from the tar, which has the ok ones in the same order."""
    index = 0
    columns = ["key", "uid", "status", "error", "text"]
    for batch in _parquet(shard, columns):
        for listed in batch:
            row = Row(index, listed["key"], listed["uid"], Status(listed["status"]), listed["error"])
            if row.status is Status.OK:
                sample = next(samples, None)
                if sample is None or sample.key != row.key:
                    actual = "nothing" if sample is None else f"{sample.key!r}"
                    text = f"{shard.url}: row {row.key!r} expected, {actual} found; the tar does not fit its Parquet"
                    raise DamagedShard(f"{text}, restore both (`capipe verify` lists what is damaged)")
                row = to_row(index, sample, MAX_OWN_BYTES)
                if row.uid != listed["uid"]:
                    raise DamagedShard(f"{shard.url}: the image of {row.key!r} is not the one that was ingested")
                row.text, row.error = listed.get("text", row.text), listed["error"]  # final shards contain captions
            yield row
            index += 1
    if next(samples, None) is not None:
        raise DamagedShard(f"{shard.url}: has samples that its Parquet does not list; restore both")


def _with_companion(rows: Iterator[Row], companion: Companion) -> Iterator[Row]:
    """Rows joined with their companion's rows. Raises ArtifactMismatch if the two are not of the same images."""
    beside = iter(companion)
    for row in rows:
        other = next(beside, None)
        if other is None or (other["key"], other["uid"]) != (row.key, row.uid):
            raise _other_image(companion, row, None if other is None else (other["key"], other["uid"]))
        row.beside[companion.name] = other
        yield row
    if next(beside, None) is not None:
        raise ArtifactMismatch(f"{companion.url}: has more rows than its shard; give --shards those it was made of")


def _other_image(companion: Companion, row: Row, found: tuple[str, str | None] | None) -> ArtifactMismatch:
    actual = "nothing" if found is None else f"{found[0]!r}"
    actual += " of another image" if found is not None and found[0] == row.key else ""
    text = f"{companion.url}: row {row.key!r} expected, {actual} found; it was not made of these shards"
    return ArtifactMismatch(f"{text}: give --shards those it was made of")


def _parquet(shard: InputShard, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    with shard.listing() as parquet:
        for batch in parquet.iter_batches(1000, columns=columns, use_threads=False):
            yield batch.to_pylist()


def to_row(index: int, sample: Sample, most: int = MAX_BYTES) -> Row:
    """A tar's sample as a row: uid computed, text and metadata decoded, their errors noted without losing the image.

    ``most``: largest sidecar to read, in bytes.
    """
    image = sample.image()
    data = image.data if image is not None else None
    if sample.status is not Status.OK or image is None or data is None:
        uid = uid_of(data) if data is not None else None
        return Row(index, sample.key, uid, sample.status, sample.error)
    notes: list[str] = []
    extension = next(ext for ext, member in sample.members.items() if member is image)
    beside = sidecars(extension, sample.members)
    text, meta = read_sidecars(_data(sample, beside.text), _data(sample, beside.meta), notes, most)
    unread = [ext for ext in sample.members if ext not in (extension, beside.text, beside.meta)]
    if unread:
        notes.append(f"members not read: {', '.join(unread)}")
    note = "; ".join(notes) or None
    uid = uid_of(data)
    return Row(index, sample.key, uid, Status.OK, note, data, extension, text, meta, offset=image.offset)


def _data(sample: Sample, extension: str | None) -> bytes | None:
    return None if extension is None else sample.members[extension].data
