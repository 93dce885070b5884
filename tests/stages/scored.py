"""Image shards with scores that no model gave."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import BASE, SCORE, asked
from capipe.manifests.shards import Row, RowReader, expand

from ..conftest import photo, tar_bytes

Values = Callable[[int, Row], Mapping[str, Any]]


def foreign_shards(folder: Path, sizes: Sequence[int], key: str = "{shard}{row:03d}") -> Path:
    """Tars as other tools write them: ``sizes`` images each, of all three formats, with captions and metadata."""
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for row in range(size):
            name = key.format(shard=shard, row=row)
            extension, fmt = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")][number % 3]
            members.append((f"{name}.{extension}", photo(number, fmt=fmt)))
            members.append((f"{name}.txt", f"alt {number}".encode()))
            members.append((f"{name}.json", b'{"n": %d, "uid": "theirs"}' % number))
            number += 1
        (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
    return folder


def clip(index: int) -> float:
    """A score from 0 to 1 that looks random and is not."""
    return int(hashlib.sha256(b"%d" % index).hexdigest()[:6], 16) / 0xFFFFFF


def plain(index: int, row: Row) -> dict[str, Any]:
    """New and original captions with scores; the original's are lower."""
    return {
        "re_caption": f"New caption {index}. It has two sentences.",
        "re_length": 7,
        "re_sentences": 2,
        "re_language": "en" if index % 4 else "de",
        "re_clip_score": clip(index),
        "re_clip_score_min": clip(index) / 2,
        "re_clip_lowest": index % 2,
        "org_caption": row.text,
        "org_length": 2,
        "org_clip_score": clip(index) / 3,
    }


def write_scores(
    shards: Path | str, out: Path | str, values: Values = plain, seed: int = 0, **semantic: Any
) -> Artifact:
    """A score artifact for shards. ``values`` of the index among all rows and the row; they may set its status, too."""
    artifact = Artifact.create(str(out), "score", {"seed": seed, **semantic}, {"shards": str(shards)})
    _write(artifact, shards, values, SCORE)
    return artifact


def write_marks(shards: Path | str, out: Path | str, values: Values) -> Artifact:
    artifact = Artifact.create(str(out), "dedup", {}, {})
    _write(artifact, shards, values, pa.schema(BASE))
    return artifact


def write_columns(
    shards: Path | str, out: Path | str, columns: Mapping[str, pa.DataType], values: Values, stage: str = "ask"
) -> Artifact:
    """An artifact of another stage with such columns, as `capipe ask` writes them."""
    artifact = Artifact.create(str(out), stage, {"columns": sorted(columns)}, {"shards": str(shards)})
    _write(artifact, shards, values, pa.schema([*BASE, *(pa.field(*column) for column in columns.items())]))
    return artifact


def _write(artifact: Artifact, shards: Path | str, values: Values, schema: Any) -> None:
    number = 0
    for shard in expand(str(shards)):
        reader = RowReader(shard)
        with artifact.begin(shard.name, schema) as out:
            start = number
            for row in reader:
                base = {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
                out.write({**base, **(values(number, row) if row.image is not None else {})})
                number += 1
            out.commit(rows_in=number - start, input_info=reader.info)
    artifact.close()


def write_answers(shards: Path | str, out: Path | str, names: Sequence[str], values: Values) -> Artifact:
    """Answers to yes-or-no questions of these names; ``values``: by column."""
    artifact = Artifact.create(str(out), "ask", {"questions": list(names)}, {"shards": str(shards)})
    _write(artifact, shards, values, asked(names))
    return artifact
