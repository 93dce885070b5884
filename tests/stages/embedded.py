"""An artifact of embeddings, as a scorer writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import EMBEDDING_COLUMN, embedding
from capipe.manifests.status import Status


def embed(
    out: Path,
    like: Artifact,
    vectors: Mapping[str, Sequence[float] | None],
    width: int,
    *,
    shards: Sequence[str] | None = None,
    rows: int | None = None,
    uid: Callable[[str | None], str | None] = lambda uid: uid,
    schema: pa.Schema | None = None,
    scorers: Mapping[str, Any] | None = None,
) -> Artifact:
    """Embeddings for the rows of ``like``, by key; those not in ``vectors`` have none. ``scorers``: the tower."""
    artifact = Artifact.create(str(out), "embed", {} if scorers is None else {"scorers": scorers}, {})
    for shard in shards or sorted(like.committed()):
        source = like.read_rows(shard)[:rows]
        with artifact.begin(shard, schema or embedding(width)) as written:
            for row in source:
                vector = vectors.get(row["key"])
                numbers = None if vector is None else [np.float16(number) for number in vector]
                base = {"key": row["key"], "uid": uid(row["uid"]), "status": Status.OK, "error": None}
                written.write({**base, EMBEDDING_COLUMN: numbers})
            written.commit(rows_in=len(source), input_info={"digest": shard})
    artifact.close()
    return artifact
