"""Captions by a prompt's fallback: of how many rows a prompt with fields lacked one. Counted by their ``prompt_id``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...stages.annotate.prompts import NamedPrompt
from .sampled import sampled

_ROWS = 10_000  # read at a time


def fallback_lines(artifact: Artifact, most: int | None = None) -> list[str]:
    """One line for each fallback that wrote captions, in at most so many of the committed shards.

    Raises ArtifactMismatch, OSError and ValueError for damaged files.
    """
    fallbacks = {prompt.name: prompt for prompt in fallbacks_of(artifact)}
    if not fallbacks:
        return []
    shards = list(artifact.committed())
    seen = shards if most is None else sampled(shards, most)
    counts = count_prompts(artifact, seen)
    where = f" (counted in {len(seen)} of {len(shards)} shards)" if len(seen) < len(shards) else ""
    lines = []
    for name in dict.fromkeys(name for name, _ in artifact.prompts()):
        if name in fallbacks and (times := counts[fallbacks[name].prompt_id]):
            total = sum(count for prompt_id, count in counts.items() if prompt_id.partition("@")[0] == name)
            lacking = "as their rows lack a field of the prompt"
            lines.append(f"prompt {name}: {times:,} of {total:,} captions are by its fallback, {lacking}{where}")
    return lines


def fallbacks_of(artifact: Artifact) -> list[NamedPrompt]:
    """The fallbacks in an annotation's configuration; entries that are none are left out."""
    annotate = artifact.config["semantic"].get("annotate")
    listed = annotate.get("fallbacks") if isinstance(annotate, dict) else None
    found = []
    for prompt in listed if isinstance(listed, list) else []:
        match prompt:
            case {"name": str(name), "text": str(text)}:
                found.append(NamedPrompt(name, text))
    return found


def count_prompts(artifact: Artifact, shards: Sequence[str]) -> Counter[str]:
    """Number of captions by ``prompt_id``."""
    counts: Counter[str] = Counter()
    for prompt_ids in _prompt_ids(artifact, shards):
        for count in pc.value_counts(prompt_ids.drop_null()).to_pylist():
            counts[count["values"]] += count["counts"]
    return counts


def _prompt_ids(artifact: Artifact, shards: Sequence[str]) -> Iterator[pa.Array]:
    for shard in shards:
        with artifact.parquet(shard) as parquet:
            paths = (parquet.schema.column(index).path for index in range(len(parquet.schema.names)))
            column = [path for path in paths if path.startswith("captions.") and path.endswith(".prompt_id")]
            for batch in parquet.iter_batches(_ROWS, columns=column, use_threads=False):
                yield pc.struct_field(pc.list_flatten(batch.column("captions")), "prompt_id")
