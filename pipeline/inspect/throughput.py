"""Rate and time left of a run, from its files' modification times (in a store: from the notes of its commits)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ...errors import CapipeError
from ...manifests.artifact import CONFIG, Artifact
from ...manifests.files.allowed import Allowed
from ...manifests.files.outside import Refused
from ...manifests.manifest import LINES, ShardRecord

WINDOW = 64  # most recent commits that count
_PAUSE = 600.0  # seconds without a commit that start a new window, unless commits are always this rare
_RARE = 10.0  # multiple of the median gap that counts as a pause for rare commits


@dataclass(frozen=True)
class Throughput:
    """``rate``: rows per second over the last commits; ``eta``: seconds; None if unknown.

    ``changed``: time of the last finished row or commit, in epoch seconds of the clock that stamped the files.
    """

    rate: float | None = None
    eta: float | None = None
    changed: float | None = None


def rows_of_input(artifact: Artifact) -> int | None:
    """Rows of the whole input; None unless it is an artifact that can be opened from here."""
    url = artifact.config["run"].get("shards")
    if not isinstance(url, str):
        return None
    try:
        source = Artifact.open(Allowed(artifact.url).place(url))
        records = source.committed()
    except (CapipeError, Refused, OSError):
        return None
    expected = source.config["run"].get("shards_total")
    return sum(record.count for record in records.values()) if len(records) == expected else None


def throughput(artifact: Artifact, records: Sequence[ShardRecord], journaled: int, total: int | None) -> Throughput:
    """Throughput of an artifact. ``journaled``: finished rows of uncommitted shards; ``total``: expected rows."""
    moments = _moments(artifact, journaled) if artifact.folder.is_local else _noted(artifact, records)
    if not moments:
        return Throughput()
    rate = _rate(moments)
    left = None if total is None else max(0, total - sum(record.count for record in records) - journaled)
    eta = left / rate if left is not None and rate else None
    return Throughput(rate, eta, moments[-1][0])


def _moments(artifact: Artifact, journaled: int) -> list[tuple[float, int]]:
    """Times and counts of finished rows, in order: the last commits with their Parquets' times, then journals."""
    known = []
    for record in artifact.manifest.latest(WINDOW):  # the others' files are not looked at: there may be many
        time = _modified(artifact, f"{record.shard}.parquet")
        known += [] if time is None else [(time, record.count)]
    known.sort()
    if journaled:
        folder = artifact.folder.private("journal")
        times = [
            time for path in folder.glob("*.jsonl") if (time := _modified(artifact, f"_capipe/journal/{path.name}"))
        ]
        start = _modified(artifact, CONFIG)
        if not known and start is not None:
            known = [(start, 0)]
        known += [(max(times), journaled)] if times else []
    return known or [(time, 0) for time in [_modified(artifact, LINES)] if time is not None]


def _noted(artifact: Artifact, records: Sequence[ShardRecord]) -> list[tuple[float, int]]:
    """Times of a store's commits, as their writers noted them."""
    notes = artifact.manifest.notes
    times = ((notes[record.shard].ended, record.count) for record in records if record.shard in notes)
    return heapq.nlargest(WINDOW, (moment for moment in times if moment[0]))[::-1]


def _modified(artifact: Artifact, name: str) -> float | None:
    try:
        return artifact.folder.local(name).stat().st_mtime
    except OSError:
        return None  # being replaced, or gone with its commit


def _rate(moments: list[tuple[float, int]]) -> float | None:
    """Rows per second since the last long pause; the first commit only starts the clock."""
    gaps = [after[0] - before[0] for before, after in pairwise(moments)]
    if not gaps:
        return None
    pause = max(_PAUSE, _RARE * median(gaps))
    first = max((index + 1 for index, gap in enumerate(gaps) if gap > pause), default=0)
    seconds = moments[-1][0] - moments[first][0]
    rows = sum(count for _, count in moments[first + 1 :])
    return rows / seconds if seconds > 0 and rows else None
