"""What screening refused, counted in an artifact of screened questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...manifests.artifact import Artifact
from ...stages.questions.screen import OUTCOMES, ScreenConfig
from ...stages.questions.screen_counts import count_screened
from .sampled import sampled

_ROWS = 1000  # read at a time
_READ = frozenset({"kind", "answer", "status", "options", *OUTCOMES})


def screening_lines(artifact: Artifact, most: int | None = None) -> list[str]:
    """The counts of each arm, in at most so many of the committed shards; nothing for criteria of another version.

    Raises ArtifactMismatch, OSError and ValueError for damaged files.
    """
    criteria = artifact.config["semantic"].get("screen")
    try:
        config = ScreenConfig.model_validate(criteria)
    except ValueError:
        return []
    shards = list(artifact.committed())
    seen = shards if most is None else sampled(shards, most)
    counts = count_screened(_entries(artifact, seen), config)
    where = f" (counted in {len(seen)} of {len(shards)} shards)" if len(seen) < len(shards) else ""
    return [f"{counts.line(config)}{where}"] if counts.asked else []


def _entries(artifact: Artifact, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with artifact.parquet(shard) as parquet:
            paths = [parquet.schema.column(index).path for index in range(len(parquet.schema.names))]
            columns = [path for path in paths if path.startswith("questions.") and _READ & {*path.split(".")}]
            for batch in parquet.iter_batches(_ROWS, columns=columns, use_threads=False):
                for questions in batch.column("questions").to_pylist():
                    yield from questions or []
