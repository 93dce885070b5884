"""Identical captions of many images: a sign of a gateway's cache, or of a model that does not see the image.

Counted by Arrow in one pass over two columns, in blocks of at most :data:`_BLOCK` bytes of text, which bound the
memory (lossy counting; Manku and Motwani, 2002). At the end of a block a text is remembered if it occurred twice in it,
or was remembered before. So a count is never too high, and too low by at most one for each earlier block; within one
block, some hundred thousand captions, it is exact. Of more than :data:`_TEXTS` remembered texts the rarest are
forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...manifests.status import Status
from .sampled import sampled

SHARED = 20  # images that may share a caption: similar images get the same short captions
SHARDS = 256  # of an artifact, to look at
_BLOCK = 64 << 20
_TEXTS = 1 << 16
_ROWS = 10_000  # read at a time
_LONGEST = 60  # characters of a caption in a message

Texts = tuple[pa.Array, pa.Array]  # for each caption, the number of its row (not falling) and its text


@dataclass(frozen=True)
class SharedCaptions:
    """``texts`` captions occur on more than :data:`SHARED` of ``seen`` images each, ``images`` times in all.

    ``commonest``: the most frequent one, which occurs ``times`` times.
    """

    texts: int
    images: int
    seen: int
    commonest: str
    times: int

    def __str__(self) -> str:
        shown = " ".join(self.commonest.split())
        shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
        if self.texts == 1:
            return f"one caption stands under {self.times} of {self.seen} images: {shown!r}"
        shared = f"{self.texts} captions stand under more than {SHARED} images each"
        return f"{shared}, {self.images} times in all; the commonest under {self.times} of {self.seen}: {shown!r}"


def warning(artifact: Artifact, most: int = SHARDS) -> str | None:
    """A line if many images have the same caption, in at most so many of the committed shards. Raises as
    :func:`shared_captions`."""
    shards = list(artifact.committed())
    seen = sampled(shards, most)
    shared = shared_captions(artifact, seen)
    where = f" (counted in {len(seen)} of {len(shards)} shards)" if len(seen) < len(shards) else ""
    return None if shared is None else f"{shared}{where}"


def shared_captions(artifact: Artifact, shards: Sequence[str]) -> SharedCaptions | None:
    """Captions shared by many images of these annotate shards; None if there are none.

    Counts only captions with status ok, and each text once per image. Raises OSError and ValueError for damaged files.
    """
    return count_shared(texts for shard in shards for texts in _texts(artifact, shard))


def count_shared(read: Iterable[Texts], block: int = _BLOCK, most: int = _TEXTS) -> SharedCaptions | None:
    """Shared captions of rows read in pieces, none of which ends within a row.

    ``block``: bytes of text counted at a time; ``most``: maximum number of texts remembered.
    """
    counts: dict[str, int] = {}
    pending: list[pa.Array] = []
    seen = size = 0
    for rows, texts in read:
        seen += len(pc.unique(rows))
        pending.append(_once_a_row(rows, texts))
        size += pending[-1].nbytes
        if size >= block:
            counts = _counted(counts, pending, most)
            pending, size = [], 0
    counts = _counted(counts, pending, most)
    shared = {text: count for text, count in counts.items() if count > SHARED}
    if not shared:
        return None
    commonest = max(shared, key=lambda text: shared[text])
    return SharedCaptions(len(shared), sum(shared.values()), seen, commonest, shared[commonest])


def _counted(counts: dict[str, int], pending: list[pa.Array], most: int) -> dict[str, int]:
    """Counts after a block of texts."""
    if not pending:
        return counts
    block = pc.value_counts(pa.chunked_array(pending, pa.string()))
    known = pc.is_in(block.field("values"), pa.array(counts, pa.string()))
    kept = block.filter(pc.or_(pc.greater(block.field("counts"), 1), known))
    for text, count in zip(kept.field("values").to_pylist(), kept.field("counts").to_pylist(), strict=True):
        counts[text] = counts.get(text, 0) + count
    if len(counts) > most:  # to half of it, so that this is not done for each block
        counts = dict(sorted(counts.items(), key=lambda item: -item[1])[: most // 2])
    return counts


def _once_a_row(rows: pa.Array, texts: pa.Array) -> pa.Array:
    """The texts, each once for each row that has it."""
    if len(rows) < 2 or bool(np.all(np.diff(np.asarray(rows)))):  # one caption a row
        return texts
    pairs = pa.table({"row": rows, "text": texts}).group_by(["row", "text"], use_threads=False).aggregate([])
    return pairs.column("text").combine_chunks()


def _texts(artifact: Artifact, shard: str) -> Iterator[Texts]:
    """Captions with status ok."""
    with artifact.parquet(shard) as parquet:
        for batch in parquet.iter_batches(_ROWS, columns=_leaves(parquet.schema), use_threads=False):
            captions = batch.column("captions")
            rows, flat = pc.list_parent_indices(captions), pc.list_flatten(captions)
            texts = pc.struct_field(flat, "text")
            healthy = pc.and_(pc.equal(pc.struct_field(flat, "status"), str(Status.OK)), pc.is_valid(texts))
            yield pc.filter(rows, healthy), pc.filter(texts, healthy)


def _leaves(schema: pa.ParquetSchema) -> list[str]:
    """Paths of the two columns that count."""
    paths = (schema.column(index).path for index in range(len(schema.names)))
    return [path for path in paths if path.startswith("captions.") and path.rpartition(".")[2] in ("text", "status")]
