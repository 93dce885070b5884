"""Retry of a committed shard's unreadable items; the other samples keep their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from ...errors import ArtifactMismatch
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...manifests.samples import read_samples
from ...manifests.status import Status

ItemRow = tuple[dict[str, Any], dict[str, bytes] | None]  # a row, and its sample's members if it has a sample


def repaired_rows(
    artifact: Artifact, made: ShardRecord, ingested: Callable[[int], ItemRow]
) -> Iterator[ItemRow] | None:
    """All rows of the committed shard ``made``, those without a final status by ``ingested`` (item number to its row).

    None if no retried item gets a final status: then there is nothing to write.
    """
    listed = artifact.read_rows(made.shard)
    tried: dict[int, ItemRow] = {}
    for number, row in enumerate(listed):
        if not Status(row["status"]).resolved:
            tried[number] = ingested(number)
            if Status(tried[number][0]["status"]).resolved:
                return _merged(artifact, made, listed, tried, ingested)
    return None


def _merged(
    artifact: Artifact,
    committed: ShardRecord,
    listed: list[dict[str, Any]],
    tried: dict[int, ItemRow],
    ingested: Callable[[int], ItemRow],
) -> Iterator[ItemRow]:
    name, digest = f"{committed.shard}.tar", hashlib.sha256()
    with artifact.folder.open(name) as stream:
        samples = read_samples(stream, digest=digest)
        for number, row in enumerate(listed):
            if not Status(row["status"]).resolved:
                yield tried.pop(number) if number in tried else ingested(number)
                continue
            if row["status"] != Status.OK:
                yield row, None
                continue
            sample = next(samples, None)
            if sample is None or sample.key != row["key"]:
                raise _damaged(artifact, name)
            yield row, {extension: member.data or b"" for extension, member in sample.members.items()}
        if next(samples, None) is not None or digest.hexdigest() != committed.files[name]["sha256"]:
            raise _damaged(artifact, name)


def _damaged(artifact: Artifact, name: str) -> ArtifactMismatch:
    text = f"{artifact.url}/{name}: its bytes are not those its manifest lists; `capipe verify` says what is wrong"
    return ArtifactMismatch(text)
