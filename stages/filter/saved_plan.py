"""The plan of a selection, kept in it: a run that resumes reads it, and not the scores of every row again.

``_capipe/plan.json`` has the plan under a digest of all that decided it: the options and the bytes of the scores, the
marks and the listings, by their manifests. Of tars that are not ours no manifest tells; there is then no plan to keep.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...manifests.files import bounded_json
from ...manifests.files.storage import PRIVATE, Folder
from ...manifests.files.store_errors import StoreUnavailable
from ...manifests.fingerprint import canonical
from ...manifests.shards import InputShard
from .select import SelectConfig

PLAN = f"{PRIVATE}/plan.json"
_DECIDING = {"keep", "top", "by", "text", "columns"}  # the other options are about the files to write
_RULES = 1  # to be raised if the same input is decided in another way


def decided_by(
    shards: Sequence[InputShard], config: SelectConfig, uids: str, threshold: str | None = None
) -> str | None:
    """Digest of what decides a plan; None if not all of it is known. ``uids``: digest of the withdrawn ones."""
    options = config.model_dump(mode="json", include=_DECIDING)
    digest = hashlib.sha256(canonical([_RULES, options, uids, threshold]).encode())
    for shard in shards:
        if shard.record is None:
            return None
        marks = [shard.name, *shard.record.current, *([part.name, part.sha256] for part in shard.companions)]
        digest.update(canonical(marks).encode())
    return digest.hexdigest()


def read(folder: Folder, digest: str | None) -> dict[str, Any] | None:
    """The plan with this digest, if the folder has it. One that cannot be read is as good as none."""
    if digest is None:
        return None
    try:
        saved = bounded_json.load_from(folder, PLAN)
        if saved["of"] == digest and saved["checksum"] == _checksum(saved["plan"]):
            return dict(saved["plan"])
    except StoreUnavailable:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write(folder: Folder, digest: str | None, plan: Mapping[str, Any]) -> None:
    if digest is not None and read(folder, digest) != plan:
        saved = {"of": digest, "plan": plan, "checksum": _checksum(plan)}
        folder.write(PLAN, json.dumps(saved, sort_keys=True).encode())


def _checksum(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(plan).encode()).hexdigest()
