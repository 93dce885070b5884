"""`capipe status`: where a run stands, read from its artifact alone (so from any process that sees the folder)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..manifests.artifact import Artifact


@dataclass(frozen=True)
class State:
    """Counts of an artifact. ``journaled``: rows finished in shards that are not committed yet."""

    stage: str
    fingerprint: str
    shards: int
    shards_total: int | None
    rows: Counter[str]
    unresolved: int
    journaled: int
    bytes: int
    seconds: float
    quarantined: dict[str, str]

    @property
    def complete(self) -> bool:
        """Every shard committed, every row's fate final."""
        return self.shards == self.shards_total and not self.unresolved and not self.quarantined

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": dict(self.rows), "complete": self.complete}


def state(url: str) -> State:
    """Read an artifact's state. Raises BadInput where there is none."""
    artifact = Artifact.open(url)
    records = artifact.committed().values()
    total = artifact.config["run"].get("shards_total")
    return State(
        stage=artifact.stage,
        fingerprint=artifact.fingerprint,
        shards=len(records),
        shards_total=None if total is None else int(total),
        rows=sum((Counter(record.rows) for record in records), Counter()),
        unresolved=sum(record.unresolved for record in records),
        journaled=_journaled(artifact),
        bytes=sum(int(file["bytes"]) for record in records for file in record.files.values()),
        seconds=round(sum(record.seconds for record in records), 1),
        quarantined=artifact.quarantined(),
    )


def _journaled(artifact: Artifact) -> int:
    """Lines in journals, but for each one's header. Only counted: a writer may be appending right now."""
    folder = artifact.folder.private("journal")
    if not folder.is_dir():
        return 0
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in folder.glob("*.jsonl"))
