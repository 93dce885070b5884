"""Export of final shards to training formats: shards are copied, merged or split.

Image bytes never change, but for formats that readers do not decode (:mod:`.transcode`).

Besides the files of the format, every shard keeps its Parquet with a row for every input row, so that an export is an
artifact like any other: resumable, verifiable, and (as webdataset) an input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field

from ...errors import ArtifactMismatch
from ...manifests.artifact import Artifact
from ...manifests.configuration import Growing
from ...manifests.file_transaction import FileTransaction
from ...manifests.files.storage import open_parquet
from ...manifests.files.tar import written_size
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ...manifests.schema import SOURCE_UID
from ...manifests.transaction import ROW_GROUP, shard_stats
from ...manifests.withdrawal.applied import applied
from ...manifests.withdrawal.rows import without
from ...manifests.withdrawal.uid_set import UidSet
from ...models.images.encoding import DEFAULT_QUALITY, Codec, Encoding
from .formats import writer_class
from .plan import ExportTask, Piece
from .source import Pair, column_of, committed_listing, copy, listing, pairs
from .transcode import Transcoder, refuse, refuse_image, relisted, schema_of, unread
from .webdataset import RewrittenTar, copy_tar
from .writer import ShardWriter

STAGE = "export"
TAR_BYTES = "tar_bytes"  # key of a shard's statistics: see _with_size
ANEW = "encoded_anew"  # likewise: number of images


class ExportConfig(Growing):
    """Options that determine the shards of an export; the card's text is not among them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later: ClassVar[tuple[str, ...]] = ("shard_size", "transcode", "quality")

    format: str = Field(description="whose files to write: a name or an import path")
    image_extension: str | None = Field(
        None, description="webdataset: name every image member alike; null: as they are"
    )
    shard_size: int | None = Field(None, ge=1, description="most pairs of a shard; null: the source's own shards")
    transcode: Codec | None = Field(None, description="how to encode what readers do not decode; null: refused")
    quality: int | None = Field(None, ge=1, le=100, description="of jpeg and webp; null: 95")

    @property
    def transcoder(self) -> Transcoder | None:
        if self.transcode is None:
            return None
        return Transcoder(Encoding(self.transcode, self.quality or DEFAULT_QUALITY), writer_class(self.format).images)


def export_shards(
    task: ExportTask,
    source: Artifact,
    artifact: Artifact,
    config: ExportConfig,
    *,
    link: bool = False,
    images: Sequence[str] = (),
) -> list[ShardRecord]:
    """Write and commit the task's shards. Raises ArtifactMismatch if the source differs from its manifest.

    ``images``: folders and URLs below which an index's tars may be read.
    """
    if task.copied and config.transcode is None and not _is_touched(source, task.sources[0], applied(artifact)):
        return [_whole(task, source, artifact, config, link, images)]
    return _cut(task, source, artifact, config, images)


def _is_touched(source: Artifact, record: ShardRecord, uids: UidSet) -> bool:
    """True if rows of a source shard are to be withdrawn."""
    return bool(len(uids) and uids.mask(pa.array(column_of(source, record, "uid"), pa.string())).any())


def _whole(
    task: ExportTask, source: Artifact, artifact: Artifact, config: ExportConfig, link: bool, images: Sequence[str]
) -> ShardRecord:
    """Export one source shard; its listing is copied and, if nothing is renamed, its tar."""
    record, size = task.sources[0], 0
    where = f"{source.url}: shard {record.shard}"
    with artifact.begin_files(record.shard, task.pieces[0].over) as out:
        for name in (listing(record.shard), f"{record.shard}_stats.json"):
            copy(source, record, name, out)
        if config.format == "webdataset" and config.image_extension is None and f"{record.shard}.tar" in record.files:
            stats = copy_tar(source, record, out, link=link)
            refuse(unread(stats["images"], RewrittenTar.images), where)
        else:
            with (
                open_parquet(str(out.path(listing(record.shard)))) as listed,
                _writer(config, out, record.shard, listed.schema_arrow) as writer,
            ):
                for pair in pairs(source, record, listed, images):
                    refuse_image(pair.image, writer.images, where)
                    writer.add(pair)
                    size += _tar_size(pair)
                stats = _with_size(writer.finish(), source, size)
        return out.commit(rows=record.rows, input_info=task.made_of(source, task.pieces[0]), stats=stats)


def _tar_size(pair: Pair) -> int:
    return sum(written_size(member.name, member.size) for member in pair.sample.members.values())


def _with_size(stats: dict[str, Any], source: Artifact, size: int) -> dict[str, Any]:
    """Statistics of a shard of an index's pairs, with the size that they would have as a tar."""
    return {**stats, TAR_BYTES: size} if is_index(source) else stats


def _writer(config: ExportConfig, out: FileTransaction, shard: str, rows: pa.Schema) -> ShardWriter:
    """Writer of the configured format. ``rows``: the listing's schema."""
    return writer_class(config.format).for_shard(out, shard, rows, config.image_extension)


def _cut(
    task: ExportTask, source: Artifact, artifact: Artifact, config: ExportConfig, images: Sequence[str]
) -> list[ShardRecord]:
    """Merge several shards, or split one: the listings first, then the pairs, each read once and in order.

    Where images are encoded anew, the pairs come first: the listing has their new uids.
    Nothing is committed before the last byte of the source has been read and verified.
    """
    uids = applied(artifact)
    with ExitStack() as stack:
        outputs = [stack.enter_context(_Part(piece, artifact, config)) for piece in task.pieces]
        if (transcoder := config.transcoder) is None:
            _list(task, source, outputs, uids)
            _add(task, source, outputs, uids, images)
        else:
            with committed_listing(source, task.sources[0]) as listed:
                schema = schema_of(listed.schema_arrow)
            for part in outputs:
                part.open(schema)
            _list(task, source, outputs, uids, _add(task, source, outputs, uids, images, transcoder))
        return [part.commit(task, source) for part in outputs]


def _list(
    task: ExportTask,
    source: Artifact,
    outputs: Sequence[_Part],
    uids: UidSet,
    changes: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Write the listings. ``changes``: new values of rows, by their number in the task."""
    offset = 0
    for record in task.sources:
        with committed_listing(source, record) as listed:
            for batch in listed.iter_batches(ROW_GROUP, use_threads=False):
                rows = without(batch, uids)
                if changes is not None:
                    rows = without(relisted(rows, offset, changes), uids)
                for part in outputs:
                    part.list(rows, offset)
                offset += batch.num_rows
    for part in outputs:
        part.end_listing()


def _add(
    task: ExportTask,
    source: Artifact,
    outputs: Sequence[_Part],
    uids: UidSet,
    images: Sequence[str],
    transcoder: Transcoder | None = None,
) -> dict[int, dict[str, Any]]:
    """Add the pairs; returns what changed of their rows, by their number in the task."""
    offset, changes = 0, dict[int, dict[str, Any]]()
    for record in task.sources:
        where = f"{source.url}: shard {record.shard}"
        with committed_listing(source, record) as listed:
            for pair in pairs(source, record, listed, images):
                if pair.row["uid"] in uids:
                    continue
                if transcoder is not None:
                    made = transcoder(pair, where)
                    changed = {name: value for name, value in made.row.items() if pair.row.get(name) != value}
                    changes[offset + pair.index] = changed
                    pair = made
                    if pair.row["uid"] in uids:
                        continue
                for part in outputs:
                    part.add(pair, offset + pair.index)
        offset += record.count
    return changes


class _Part:
    """One of the shards that a task writes simultaneously."""

    def __init__(self, piece: Piece, artifact: Artifact, config: ExportConfig) -> None:
        self._piece, self._config, self._artifact = piece, config, artifact
        self._rows: Counter[str] = Counter()
        self._size = self._anew = 0
        self._stack = ExitStack()
        self._writer: ShardWriter | None = None

    def __enter__(self) -> _Part:
        self._out = self._stack.enter_context(self._artifact.begin_files(self._piece.shard, self._piece.over))
        self._listing = self._stack.enter_context(ExitStack())
        self._parquet: pq.ParquetWriter | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def open(self, schema: pa.Schema) -> ShardWriter:
        """Begin the files of the format, once. ``schema``: of the listing."""
        if self._writer is None:
            self._schema = schema
            self._writer = self._stack.enter_context(_writer(self._config, self._out, self._piece.shard, schema))
        return self._writer

    def list(self, batch: pa.RecordBatch, offset: int) -> None:
        """Write this part's rows of a batch; ``offset``: number of its first row."""
        start, stop = max(0, self._piece.start - offset), min(batch.num_rows, self._piece.stop - offset)
        if start >= stop:
            return
        ours = batch.slice(start, stop - start)
        if self._parquet is None:
            file = self._listing.enter_context(self._out.writing(listing(self._piece.shard)))
            self._schema = batch.schema
            writer = pq.ParquetWriter(file, self._schema, compression="zstd")
            self._parquet = self._listing.enter_context(writer)
        elif batch.schema != self._schema:
            text = f"{self._artifact.url}: shard {self._piece.shard} would be of shards with different columns"
            raise ArtifactMismatch(
                f"{text}; leave out --shard-size, or run the stage that made them again with --fresh"
            )
        self._parquet.write_batch(ours)
        self._rows.update(ours.column("status").to_pylist())

    def end_listing(self) -> None:
        self._listing.close()
        stats = shard_stats(self._rows)
        with self._out.writing(f"{self._piece.shard}_stats.json") as file:
            file.write(stats)
        self.open(self._schema)

    def add(self, pair: Pair, row: int) -> None:
        if self._piece.start <= row < self._piece.stop:
            writer = self.open(self._schema)
            refuse_image(pair.image, writer.images, f"{self._artifact.url}: shard {self._piece.shard}")
            writer.add(pair)
            self._size += _tar_size(pair)
            self._anew += self._config.transcode is not None and pair.row[SOURCE_UID] != pair.row["uid"]

    def commit(self, task: ExportTask, source: Artifact) -> ShardRecord:
        stats = _with_size(self.open(self._schema).finish(), source, self._size)
        stats |= {ANEW: self._anew} if self._anew else {}
        return self._out.commit(rows=self._rows, input_info=task.made_of(source, self._piece), stats=stats)
