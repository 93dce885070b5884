"""Identical captions of many images: a sign of a gateway's cache, or of a model that does not see the image.

Counted by digest, in one pass and in bounded memory: beyond a limit the rarest digests are dropped (lossy counting;
Manku and Motwani, 2002), so a count is never too high.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...manifests.status import Status

SHARED = 20  # images that may share a caption: similar images get the same short captions
_DIGESTS = 1 << 18  # digests in memory: some 30 MB
_LONGEST = 60  # characters of a caption in a message


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


def shared_captions(artifact: Artifact, shards: Sequence[str]) -> SharedCaptions | None:
    """Captions shared by many images of these annotate shards; None if there are none.

    Counts only captions with status ok, and each text once per image. Raises OSError and ValueError for damaged files.
    """
    return count_shared(texts for shard in shards for texts in _texts(artifact, shard))


def count_shared(images: Iterable[set[str]], digests: int = _DIGESTS) -> SharedCaptions | None:
    """Shared captions from sets of texts, one per image. ``digests``: maximum number in memory."""
    counts: Counter[bytes] = Counter()
    seen, floor, commonest, most = 0, 1, "", 0
    for texts in images:
        seen += bool(texts)
        for text in texts:
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            counts[digest] += 1
            if counts[digest] > most:
                commonest, most = text, counts[digest]
        while len(counts) > digests:
            counts = Counter({digest: count for digest, count in counts.items() if count > floor})
            floor += len(counts) > digests // 2
    shared = [count for count in counts.values() if count > SHARED]
    return SharedCaptions(len(shared), sum(shared), seen, commonest, most) if shared else None


def _texts(artifact: Artifact, shard: str) -> Iterator[set[str]]:
    """Distinct captions with status ok of each row that has any."""
    with artifact.parquet(shard) as parquet:
        for batch in parquet.iter_batches(1000, columns=["captions"], use_threads=False):
            captions = batch.column("captions")
            rows, flat = pc.list_parent_indices(captions), pc.list_flatten(captions)
            healthy = pc.equal(pc.struct_field(flat, "status"), str(Status.OK))
            texts: dict[int, set[str]] = {}
            for row, text in zip(_kept(rows, healthy), _kept(pc.struct_field(flat, "text"), healthy), strict=True):
                texts.setdefault(row, set()).add(text)
            yield from texts.values()


def _kept(values: pa.Array, flags: pa.BooleanArray) -> list[Any]:
    kept: list[Any] = pc.filter(values, flags).to_pylist()
    return kept
