"""Quarantine: shards that failed, each with its reason, in ``_capipe/quarantine/``, until the next run tries again."""

from __future__ import annotations

import json

from ...errors import ArtifactMismatch
from ..files import bounded_json
from ..files.redaction import redacted
from ..files.storage import PRIVATE, Folder
from ..files.store_errors import StoreUnavailable
from ..fingerprint import encodable

QUARANTINE = f"{PRIVATE}/quarantine"


def put(folder: Folder, shard: str, reason: str) -> None:
    entry = {"shard": shard, "error": redacted(reason)}
    folder.write(f"{QUARANTINE}/{shard}.json", encodable(json.dumps(entry, ensure_ascii=False)).encode())


def read(folder: Folder) -> dict[str, str]:
    """Quarantined shards with their reasons. Raises ArtifactMismatch for a malformed file."""
    errors = {}
    for name in folder.names(QUARANTINE):
        file = f"{QUARANTINE}/{name}"
        try:
            entry = bounded_json.load_from(folder, file)
            errors[str(entry["shard"])] = str(entry["error"])
        except StoreUnavailable:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{folder.url}/{file}: not a quarantined shard ({error}); remove the file to have it tried again"
            raise ArtifactMismatch(text) from None
    return errors


def holds(folder: Folder, shard: str) -> bool:
    return folder.exists(f"{QUARANTINE}/{shard}.json")
