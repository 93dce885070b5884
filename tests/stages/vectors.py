"""Made-up embeddings, the search among them in this process, and its slow twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import HASHES, embedding
from capipe.stages.dedup.arrays import Indices
from capipe.stages.dedup.embeddings.forest import Edges, Vectors, cosines, reach
from capipe.stages.dedup.embeddings.reading import ReferenceVectors
from capipe.stages.dedup.embeddings.work import STAGE, EmbeddingSearch, NearFiles
from capipe.stages.dedup.groups import connected
from capipe.stages.dedup.hash_sets import HashSet, read_hash_set

from .near import all_steps


def clustered(count: int, centers: int, width: int, spread: float, seed: int) -> Vectors:
    """Vectors around random directions, of other lengths each: cosines within a cluster lie around the bound."""
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(centers, width))
    made = middle[rng.integers(0, centers, count)] + spread * rng.normal(size=(count, width))
    return (made * rng.uniform(0.5, 2, (count, 1))).astype(np.float16)


def every_pair(vectors: Vectors, cosine: float, others: Vectors | None = None) -> Edges:
    """The slow twin: all pairs ``i < j`` that reach ``cosine``, in double precision; with ``others``, all pairs."""
    if others is None:
        i, j = np.triu_indices(len(vectors), 1)
        values = cosines(vectors, i, j)
    else:
        i, j = (side.ravel() for side in np.indices((len(vectors), len(others))))
        values = cosines(np.concatenate([vectors, others]), i, j + len(vectors))
    near = reach(values, cosine)
    return Edges(i[near], j[near], values[near])


def groups(count: int, edges: Edges) -> Indices:
    """The lowest node of each one's group."""
    return connected(count, edges.left, edges.right)


def embedded_files(
    folder: Path, vectors: Vectors, per_shard: int, seed: int = 0, uids: Sequence[str] | None = None
) -> tuple[HashSet, Artifact, Indices]:
    """Artifacts of hashes and of embeddings with a row for each vector, and the file of each."""
    rng = np.random.default_rng(seed)
    hashes = Artifact.create(str(folder / "hashes"), "hash", {}, {})
    embeddings = Artifact.create(str(folder / "embeddings"), "embed", {}, {})
    keys = [f"{row:07}" for row in range(len(vectors))]
    uids = uids or [rng.bytes(16).hex() for _ in keys]
    names = []
    for number, start in enumerate(range(0, len(vectors), per_shard)):
        part = slice(start, start + per_shard)
        names.append(f"{number:05}")
        write_rows(hashes, names[-1], HASHES, keys[part], uids[part], rng=rng)
        write_rows(embeddings, names[-1], embedding(vectors.shape[1]), keys[part], uids[part], vectors[part])
    hashes.close()
    embeddings.close()
    hashed = read_hash_set(hashes, names)
    return hashed, embeddings, hashed.rows


def write_rows(
    artifact: Artifact,
    shard: str,
    schema: pa.Schema,
    keys: Sequence[str],
    uids: Sequence[str],
    vectors: Vectors | None = None,
    rng: np.random.Generator | None = None,
) -> None:
    """Commit a shard of rows at once, with random hashes or with vectors."""
    count = len(keys)
    given = {"key": pa.array(keys), "uid": pa.array(uids), "status": pa.array(["ok"] * count)}
    if rng is not None:
        hashes = rng.integers(0, 1 << 64, (3, count), dtype=np.uint64)
        given |= {name: pa.array(hashes[k]) for k, name in enumerate(("phash", "inner", "look"))}
        given |= {name: pa.array(np.full(count, 100, dtype=np.int32)) for name in ("width", "height")}
    if vectors is not None:
        flat = pa.array(np.ascontiguousarray(vectors).ravel())
        given["image_embedding"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    columns = [given.get(field.name, pa.nulls(count, field.type)) for field in schema]
    with artifact.begin_files(shard) as out:
        with out.writing(f"{shard}.parquet") as file:
            pq.write_table(pa.table(columns, schema=schema), file, row_group_size=1000)
        out.commit(rows={"ok": count}, input_info={"digest": shard})


def searched(
    folder: Path,
    hashed: HashSet,
    embeddings: Artifact,
    cosine: float,
    references: ReferenceVectors | None = None,
    device: str = "faiss",
) -> NearFiles:
    """All steps of the search, one task after another."""
    with embeddings.parquet(hashed.shards[0]) as file:
        width = file.schema_arrow.field("image_embedding").type.list_size
    search = EmbeddingSearch(hashed, embeddings, references, width, cosine, [device])
    found: NearFiles = all_steps(search, folder, STAGE)
    return found
