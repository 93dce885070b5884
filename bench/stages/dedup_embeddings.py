"""Search for near embeddings, as `capipe dedup --embeddings` runs it: recall, core-minutes and peak memory.

N vectors of 512 numbers in clusters of a thousand (random directions; noise of the same length with a power-law
spectrum, as embeddings have, so that cosines within a cluster lie around 0.5; other shapes by options), in artifacts of
10,000 rows a shard. One row in a hundred is a copy of another row, turned in a direction of the noise to a cosine
within 0.01 above the threshold. Recall: the share of these pairs, of those that reach the threshold as stored in half
precision, whose two vectors end in one group. At 0.96 hardly any other pair is near, so none is joined by way of a
third vector.

The artifacts are written by a process of their own. The figures are of the search alone: all of its tasks, in as many
processes as cores, with their results on disk. `peak_mib`: of the process that hands out tasks, and of the largest
worker.

    python bench/stages/dedup_embeddings.py [--sizes 20000 200000] [--workers 2] [--folder SCRATCH]
    python bench/stages/dedup_embeddings.py --sizes 1000000 5000000       # 5 GB and 25 GB of scratch
    python bench/stages/dedup_embeddings.py --sizes 60000 --per-cluster 60000 --noise 5 --isotropic  # no structure
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import report, version

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import EMBEDDING_COLUMN, HASHES, embedding
from capipe.pipeline.jobs.near_search import run_steps
from capipe.pipeline.runners.placement import TaskPlacement
from capipe.stages.dedup.embeddings.backends import FAISS
from capipe.stages.dedup.embeddings.forest import Vectors, cosines, reach
from capipe.stages.dedup.embeddings.work import STAGE, EmbeddingSearch
from capipe.stages.dedup.groups import connected
from capipe.stages.dedup.hash_sets import read_hash_set
from capipe.stages.dedup.steps import Step

WIDTH, PER_SHARD, PLANTED = 512, 10_000, 100
COSINE = 0.96


@dataclass(frozen=True)
class Shape:
    """``per_cluster``: vectors in a cluster, on average; ``noise``: its length, for centers of length 1."""

    per_cluster: int = 1000
    noise: float = 1.0
    isotropic: bool = False

    def arguments(self) -> list[str]:
        options = ["--per-cluster", str(self.per_cluster), "--noise", str(self.noise)]
        return [*options, *(["--isotropic"] if self.isotropic else [])]


class Clusters:
    """The made-up vectors of ``count`` rows, shard by shard; the last one in a hundred rows of each is a copy."""

    def __init__(self, count: int, shape: Shape) -> None:
        rng = np.random.default_rng(0)
        self._count, self._shape = count, shape
        spectrum = np.arange(1, WIDTH + 1, dtype=np.float32) ** (0.0 if shape.isotropic else -0.5)
        turned = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
        self._noise = (spectrum / np.linalg.norm(spectrum))[:, None] * turned
        self._centers = unit(self._drawn(rng, max(1, count // shape.per_cluster)))

    def _drawn(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.standard_normal((count, WIDTH), dtype=np.float32) @ self._noise

    def original(self, rows: np.ndarray) -> np.ndarray:
        """Row of which each row is a copy, itself where it is none: of another shard, where there are some."""
        place, shards = rows % PER_SHARD, -(-self._count // PER_SHARD)
        copied = place % PLANTED == PLANTED - 1
        return np.where(copied, (rows // PER_SHARD * 7 + 3) % shards * PER_SHARD + place - 1, rows)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Unit vectors of rows that are no copies; each depends on its number alone."""
        out = np.empty((len(rows), WIDTH), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            rng = np.random.default_rng(1000 + row)
            center = self._centers[rng.integers(len(self._centers))]
            out[place] = center + self._shape.noise * self._drawn(rng, 1)[0]
        return unit(out)

    def shard(self, number: int) -> Vectors:
        rows = np.arange(number * PER_SHARD, min(self._count, (number + 1) * PER_SHARD))
        original = self.original(rows)
        vectors, copied = self.vectors(original), original != rows
        rng = np.random.default_rng([1, number])
        aside = self._drawn(rng, int(copied.sum()))
        near = vectors[copied]
        aside = unit(aside - (aside * near).sum(axis=1, keepdims=True) * near)
        cosine = rng.uniform(COSINE, COSINE + 0.01, (len(near), 1)).astype(np.float32)
        vectors[copied] = cosine * near + np.sqrt(1 - cosine**2) * aside
        return vectors.astype(np.float16)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, count: int, shape: Shape) -> None:
    """Artifacts of hashes (random ones) and of embeddings."""
    made, rng = Clusters(count, shape), np.random.default_rng(2)
    hashes = Artifact.create(str(folder / "hashes"), "hash", {}, {})
    embeddings = Artifact.create(str(folder / "embeddings"), "embed", {}, {})
    for number in range(-(-count // PER_SHARD)):
        vectors, name = made.shard(number), f"{number:05}"
        rows = len(vectors)
        base = {
            "key": pa.array([f"{name}{row:05}" for row in range(rows)]),
            "uid": pa.array([rng.bytes(16).hex() for _ in range(rows)]),
            "status": pa.array(["ok"] * rows),
        }
        numbers = rng.integers(0, 1 << 64, (3, rows), dtype=np.uint64)
        hashed = {column: pa.array(numbers[k]) for k, column in enumerate(("phash", "inner", "look"))}
        hashed |= {side: pa.array(np.full(rows, 100, dtype=np.int32)) for side in ("width", "height")}
        commit(hashes, name, HASHES, {**base, **hashed})
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
        commit(embeddings, name, embedding(WIDTH), {**base, EMBEDDING_COLUMN: column})
    hashes.close()
    embeddings.close()


def commit(artifact: Artifact, shard: str, schema: pa.Schema, given: dict[str, pa.Array]) -> None:
    rows = len(given["key"])
    columns = [given.get(field.name, pa.nulls(rows, field.type)) for field in schema]
    with artifact.begin_files(shard) as out:
        with out.writing(f"{shard}.parquet") as file:
            pq.write_table(pa.table(columns, schema=schema), file, row_group_size=1000)
        out.commit(rows={"ok": rows}, input_info={"digest": shard})


def core_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(folder: Path, count: int, workers: int, shape: Shape) -> dict[str, Any]:
    """Figures of one search."""
    names = [f"{number:05}" for number in range(-(-count // PER_SHARD))]
    hashes, embeddings = (Artifact.open(str(folder / name)) for name in ("hashes", "embeddings"))
    begun, cores = time.monotonic(), core_seconds()
    hashed = read_hash_set(hashes, names)
    search = EmbeddingSearch(hashed, embeddings, None, WIDTH, COSINE, [FAISS])
    work = Artifact.create(str(folder / "work"), STAGE, search.config, {})
    seconds: dict[str, float] = {}

    def timed() -> Iterator[Step]:
        before = core_seconds()
        for step in search.steps(work):
            yield step
            seconds[step.name] = round(core_seconds() - before, 1)
            before = core_seconds()

    assert run_steps(timed(), work, TaskPlacement(workers), lambda event: None, threading.Event())
    found = search.result(work)
    groups = connected(count, found.edges.left, found.edges.right)
    cores, wall = core_seconds() - cores, time.monotonic() - begun
    scratch = sum(path.stat().st_size for path in (folder / "work").rglob("*") if path.is_file())
    recall, planted = recalled(embeddings, names, hashed.rows, groups, shape)
    work.close()
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "recall": round(recall, 5),
        "core_minutes": round(cores / 60, 2),
        "peak_mib": round(kib / 1024),
        "wall_minutes": round(wall / 60, 2),
        "planted": planted,
        "pairs_kept": len(found.edges),
        "scratch_gib": round(scratch / 2**30, 2),
        "core_seconds": seconds,
    }


def recalled(
    embeddings: Artifact, names: list[str], file: np.ndarray, groups: np.ndarray, shape: Shape
) -> tuple[float, int]:
    """Share of the planted pairs that are in one group, and the number of planted pairs."""
    made, found, planted = Clusters(len(file), shape), 0, 0
    for number, name in enumerate(names):
        vectors = embeddings.table(name, [EMBEDDING_COLUMN])[EMBEDDING_COLUMN].combine_chunks().flatten()
        rows = number * PER_SHARD + np.arange(len(vectors) // WIDTH)
        original = made.original(rows)
        copied = np.flatnonzero(original != rows)
        near = vectors.to_numpy(zero_copy_only=False).reshape(-1, WIDTH)[copied]
        both = np.concatenate([near, made.vectors(original[copied]).astype(np.float16)])
        place = np.arange(len(copied))
        reached = reach(cosines(both, place, place + len(copied)), COSINE)
        together = groups[file[rows[copied]]] == groups[file[original[copied]]]
        planted, found = planted + int(reached.sum()), found + int((together & reached).sum())
    return found / planted, planted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 200_000], help="multiples of 10,000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="scratch folder; a temporary one by default")
    parser.add_argument("--write", type=int, help="write the artifacts of so many vectors into --folder, no more")
    parser.add_argument("--per-cluster", type=int, default=Shape.per_cluster)
    parser.add_argument("--noise", type=float, default=Shape.noise)
    parser.add_argument("--isotropic", action="store_true", help="the noise has no main directions")
    options = parser.parse_args()
    shape = Shape(options.per_cluster, options.noise, options.isotropic)
    if options.write is not None:
        write(options.folder, options.write, shape)
        return
    results = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            command = [sys.executable, __file__, "--folder", folder, "--write", str(size), *shape.arguments()]
            subprocess.run(command, check=True)
            results[str(size)] = measured(Path(folder), size, options.workers, shape)
            print(size, results[str(size)], flush=True)
    largest = results[str(max(options.sizes))]
    keys = {key: largest[key] for key in ("recall", "core_minutes", "peak_mib")}
    report(
        "dedup_embeddings",
        {},
        {"faiss": version("faiss-cpu")},
        **keys,
        cosine=COSINE,
        width=WIDTH,
        shape=asdict(shape),
        sizes=results,
    )


if __name__ == "__main__":
    main()
