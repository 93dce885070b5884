"""Files over all shards of a complete artifact, which need not be written again while nothing that they tell changed.

The configuration notes their sizes and hashes (``finals``, which `capipe verify` checks; null while they are older than
the shards) and a digest of what they were made of (``finals_of``): the manifest, and whatever else is in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..manifests.artifact import Artifact
from ..manifests.fingerprint import canonical

FINALS, MADE_OF = "finals", "finals_of"
_READ = 1 << 20  # bytes of a file whose hash is compared: of a larger one, an index, the size is


def digest_of(artifact: Artifact, facts: Any) -> str:
    """Digest of the committed shards and of ``facts`` (JSON) that go into the files, too."""
    return hashlib.sha256(canonical([__version__, artifact.manifest_digest(), facts]).encode()).hexdigest()


def are_there(artifact: Artifact, digest: str) -> bool:
    """True if the files were made of just this, and are as they were."""
    run = artifact.config["run"]
    finals = run.get(FINALS)
    return run.get(MADE_OF) == digest and bool(finals) and all(_is(artifact, *item) for item in finals.items())


def _is(artifact: Artifact, name: str, file: Mapping[str, Any]) -> bool:
    try:
        if file["bytes"] > _READ:
            return bool(artifact.folder.size(name) == file["bytes"])
        return bool(hashlib.sha256(artifact.folder.read_bytes(name)).hexdigest() == file["sha256"])
    except OSError:
        return False


def note(artifact: Artifact, digest: str, files: Mapping[str, Mapping[str, Any]], **more: Any) -> None:
    """Record files that were written, with ``bytes`` and ``sha256`` by name, and ``more`` facts about the run."""
    artifact.note(**{FINALS: files, MADE_OF: digest, **more})


def outdate(artifact: Artifact) -> None:
    """Record, before the first shard is written again, that the files will be older than the shards."""
    if artifact.config["run"].get(FINALS) is not None:
        artifact.note(**{FINALS: None})
