"""The search for near images in this process, its slow twin, and hashes whose images are made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import HASHES
from capipe.stages.dedup.arrays import U64, Bools, Indices
from capipe.stages.dedup.groups import connected, lookalikes
from capipe.stages.dedup.hash_sets import HashSet, read_hash_set
from capipe.stages.dedup.marks import Pairs
from capipe.stages.dedup.near.looks import Source, read_signatures
from capipe.stages.dedup.near.work import STAGE, NearSearch
from capipe.stages.dedup.perceptual_hash import SIGNATURE_BYTES, Signatures
from capipe.stages.dedup.search.multi_index import candidates, candidates_between
from capipe.stages.dedup.signatures.slow_confirm import same_picture


def searched(
    folder: Path, hashed: HashSet, references: HashSet | None = None, radius: int = 7
) -> tuple[Indices, Indices]:
    """All steps of the search, one task after another."""
    return all_steps(NearSearch(hashed, references, radius), folder, STAGE)


def all_steps(search: Any, folder: Path, stage: str) -> Any:
    """The result of a search by tasks, here one after another."""
    work = Artifact.create(str(folder), stage, search.config, {})
    try:
        for step in search.steps(work):
            for task in step.todo:
                step.write(task, artifact=work.attach())
        return search.result(work)
    finally:
        work.close()


def searched_slowly(hashed: HashSet, references: HashSet | None = None, radius: int = 7) -> Pairs:
    """The slow twin: every candidate by multi-index hashing, each confirmed by the slow judgement."""
    count = len(hashed.contents)
    mine = np.unique(lookalikes(hashed.contents))
    i, j = candidates(hashed.contents.take(mine), radius)
    same = _judged(signatures(hashed, mine[i]), signatures(hashed, mine[j]))
    left, right = mine[i][same], mine[j][same]
    if references is not None:
        theirs = np.unique(lookalikes(references.contents))
        i, j = candidates_between(hashed.contents.take(mine), references.contents.take(theirs), radius)
        same = _judged(signatures(hashed, mine[i]), signatures(references, theirs[j]))
        left, right = np.append(left, mine[i][same]), np.append(right, count + theirs[j][same])
    return left, right


def _judged(a: Signatures, b: Signatures) -> Bools:
    """The slow judgement of each pair, made once for equal pairs."""
    numbers: dict[bytes, int] = {}
    places = np.array(
        [numbers.setdefault(one.tobytes() + other.tobytes(), len(numbers)) for one, other in zip(a, b, strict=True)]
    )
    if not len(places):
        return np.zeros(0, dtype=bool)
    first = np.unique(places, return_index=True)[1]
    return same_picture(a[first], b[first])[places]


def outcome(pairs: Pairs, count: int) -> tuple[list[int], dict[int, int]]:
    """What pairs of nodes come to: the group of each file, and the lowest reference of each group."""
    left, right = pairs
    files = right < count
    groups = connected(count, left[files], right[files])
    lowest: dict[int, int] = {}
    for file, reference in zip(left[~files].tolist(), right[~files].tolist(), strict=True):
        group = int(groups[file])
        lowest[group] = min(lowest.get(group, reference), reference)
    return groups.tolist(), lowest


def signatures(hashed: HashSet, files: Indices) -> Signatures:
    """Signatures of files, in their order."""
    rows, places = np.unique(hashed.first[files], return_inverse=True)
    sources = [
        Source(hashed.artifact, shard, int(first)) for shard, first in zip(hashed.shards, hashed.starts, strict=False)
    ]
    return read_signatures(sources, rows)[places]


def hash_set(
    folder: Path, phash: U64, inner: U64, looks: Sequence[bytes] | Signatures, seed: int = 0, per_shard: int = 500
) -> HashSet:
    """A committed artifact of hashes whose images are made up: one file per row, with random uids."""
    rng = np.random.default_rng(seed)
    artifact = Artifact.create(str(folder), "hash", {}, {})
    names = []
    for number, start in enumerate(range(0, len(phash), per_shard)):
        names.append(f"{number:05}")
        with artifact.begin(names[-1], HASHES) as shard:
            for row in range(start, min(start + per_shard, len(phash))):
                data = bytes(looks[row])
                shard.write(
                    {
                        "key": f"{row:07}",
                        "uid": rng.bytes(16).hex(),
                        "status": "ok",
                        "sha256": rng.bytes(32).hex(),
                        "width": 100,
                        "height": 100,
                        "phash": int(phash[row]),
                        "inner": int(inner[row]),
                        "signature": data,
                        "look": int.from_bytes(data[:8]) ^ int(np.frombuffer(data, np.uint64).sum()),
                        "source": f"{row:07}.jpg",
                    }
                )
            shard.commit(rows_in=min(start + per_shard, len(phash)) - start, input_info={"digest": ""})
    artifact.close()
    return read_hash_set(artifact, names)


def flipped(hashes: U64, bits: int | npt.NDArray[np.int64], rng: np.random.Generator) -> U64:
    """The hashes, with up to so many bits of each the other way round."""
    out = hashes.copy()
    bits = np.broadcast_to(bits, len(hashes))
    for turn in range(int(bits.max(initial=0))):
        out ^= np.where(turn < bits, np.uint64(1) << rng.integers(0, 64, len(out), dtype=np.uint64), np.uint64(0))
    return out


def plain_looks(levels: npt.NDArray[np.int64]) -> Signatures:
    """Signatures of flat grey images: those of one level are the same image, and those 40 levels apart are not."""
    looks = np.full((len(levels), SIGNATURE_BYTES), 128, dtype=np.uint8)
    looks[:, :4096] = levels[:, None]
    return looks
