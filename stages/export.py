"""Export: final shards in the files that trainers read. One task is one shard; image bytes are never touched.

Beside what the format asks for, every shard keeps its Parquet with a row for every input row, so that an export is an
artifact like any other: resumable, verifiable, and (as webdataset) an input.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..manifests.artifact import Artifact
from ..manifests.manifest import ShardRecord
from .export_parquet import write_training_parquet
from .export_source import copy, listing, made_of
from .export_tar import write_tar
from .llava import write_images

STAGE = "export"


class ExportConfig(BaseModel):
    """What decides the shards of an export; the card's words are not among it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["webdataset", "parquet", "llava"] = Field(description="whose files to write")
    image_extension: str | None = Field(
        None, description="webdataset: name every image member alike; null: as they are"
    )


def export_shard(
    record: ShardRecord, source: Artifact, artifact: Artifact, config: ExportConfig, *, link: bool = False
) -> ShardRecord:
    """Write and commit one shard of ``source``. Raises ArtifactMismatch where its bytes are not what was committed."""
    with artifact.begin_files(record.shard) as out:
        for name in (listing(record.shard), f"{record.shard}_stats.json"):
            copy(source, record, name, out)
        match config.format:
            case "webdataset":
                stats = write_tar(source, record, out, config.image_extension, link=link)
            case "parquet":
                stats = write_training_parquet(source, record, out)
            case "llava":
                stats = write_images(source, record, out)
        return out.commit(rows=record.rows, input_info=made_of(source, record), stats=stats)
