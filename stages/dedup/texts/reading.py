"""First pass over texts: each shard's are read, normalized and signed. Nothing is compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ....manifests.artifact import Artifact
from ....manifests.files.storage import expecting, parquet_of
from ....manifests.joining.companion import Companion
from ....manifests.manifest import ShardRecord
from ....manifests.schema import TEXTS
from ....manifests.shards import ROWS, InputShard, RowReader
from ....manifests.status import Status
from ...annotate.captioner import chosen_caption
from .bands import sign
from .shingles import normalized, shingles

STAGE = "text"
CAPTIONS = "captions"  # name of the annotate artifact among a shard's companions
_BATCH = 1000


@dataclass(frozen=True)
class TextRow:
    """A row's text before any comparison; None if there is none."""

    key: str
    uid: str | None
    status: str
    error: str | None
    text: str | None


def read_texts(task: InputShard, artifact: Artifact) -> ShardRecord:
    """Normalize and sign the texts of one shard; write and commit. At most 1000 texts are in memory."""
    source, rows = text_rows(task), 0
    with artifact.begin(task.name, TEXTS) as out:
        while batch := list(islice(source.rows, _BATCH)):
            for row in _signed(batch):
                out.write(row)
            rows += len(batch)
        return out.commit(rows_in=rows, input_info=source.info())


def _signed(batch: Sequence[TextRow]) -> Iterator[dict[str, Any]]:
    texts = [normalized(row.text) if row.status == Status.OK and row.text is not None else "" for row in batch]
    present = [text for text in texts if text]
    signatures = iter(sign([shingles(text) for text in present]).astype("<u2"))
    for row, text in zip(batch, texts, strict=True):
        out: dict[str, Any] = {"key": row.key, "uid": row.uid, "status": row.status, "error": row.error}
        if text:
            out |= {"text": text, "digest": digest_of_text(text), "signature": next(signatures).tobytes()}
        yield out


def digest_of_text(text: str) -> bytes:
    """16 bytes that identify a normalized text."""
    return hashlib.sha256(text.encode()).digest()[:16]


@dataclass(frozen=True)
class TextSource:
    """A shard's texts, and the entry for the manifest, known after the iteration."""

    rows: Iterator[TextRow]
    info: Callable[[], dict[str, Any]]


def text_rows(task: InputShard) -> TextSource:
    """Texts of a shard: new captions if it is joined with an annotate artifact, else its own.

    No tar is opened where a Parquet has the texts.
    """
    if captions := next((companion for companion in task.companions if companion.name == CAPTIONS), None):
        info = {"digest": captions.sha256, "companions": {CAPTIONS: captions.sha256}}
        return TextSource(_captions(captions), lambda: info)
    if task.record is not None and "text" in _columns(task):
        listed = _listing(task, task.record)
        tar = task.record.files[f"{task.name}.tar"]
        of_tar = {"url": task.url, "digest": tar["sha256"], "bytes": tar["bytes"], ROWS: listed.sha256}
        return TextSource(_listed(listed), lambda: of_tar)
    return read_rows(task)


def read_rows(task: InputShard) -> TextSource:
    """The shard's own texts, from its tar."""
    reader = RowReader(task)
    rows = (TextRow(row.key, row.uid, str(row.status), row.error, row.text) for row in reader)
    return TextSource(rows, lambda: reader.info)


def _columns(task: InputShard) -> list[str]:
    with task.listing() as parquet:
        names: list[str] = parquet.schema_arrow.names
        return names


def _listing(task: InputShard, record: ShardRecord) -> Companion:
    url = task.url.removesuffix(".tar") + ".parquet"
    return Companion("images", url, str(record.files[f"{task.name}.parquet"]["sha256"]), record.count)


def _listed(listed: Companion) -> Iterator[TextRow]:
    columns = ["key", "uid", "status", "error", "text"]
    with expecting(parquet_of(listed.read()), listed.rows, listed.url) as parquet:
        for batch in parquet.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield from (TextRow(**row) for row in batch.to_pylist())


def _captions(companion: Companion) -> Iterator[TextRow]:
    for row in companion:
        yield TextRow(row["key"], row["uid"], row["status"], row["error"], chosen_caption(row))
