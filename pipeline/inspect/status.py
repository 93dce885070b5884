"""`capipe status`: state of a run, read from its files only, so from any machine that can read them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...manifests.artifact import Artifact
from ...manifests.files import bounded_json
from ...manifests.files.allowed import read_log
from ...manifests.files.outside import Refused, open_local
from ...manifests.manifest import ShardRecord
from ...trainer.log import SECONDS, STEPS, TIMES, read_best
from .discover import RUN
from .throughput import rows_of_input, throughput


@dataclass(frozen=True)
class State:
    """Counts of an artifact. ``journaled``: finished rows in shards that are not committed yet.

    ``rate`` (rows per second) and ``eta`` (seconds left) are None if nothing is running or they are unknown;
    ``idle``: seconds since the last finished row or commit, by this machine's clock.
    """

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
    rows_total: int | None = None
    rate: float | None = None
    eta: float | None = None
    idle: float | None = None

    @property
    def complete(self) -> bool:
        """Whether every shard is committed and every row resolved."""
        return self.shards == self.shards_total and not self.unresolved and not self.quarantined

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": dict(self.rows), "complete": self.complete}


def state(url: str) -> State:
    """Read an artifact's state. Raises BadInput without an artifact."""
    return state_of(Artifact.open(url))


def state_of(artifact: Artifact) -> State:
    """Current state of an artifact, which may be written meanwhile."""
    records = list(artifact.committed().values())
    recorded = artifact.config["run"].get("shards_total")
    total = None if recorded is None else int(recorded)
    done, journaled = len(records) == total, _journaled(artifact)
    rows_total = None if done else _rows_total(artifact, records, total)
    speed, spent = throughput(artifact, records, journaled, rows_total), artifact.seconds()
    return State(
        stage=artifact.stage,
        fingerprint=artifact.fingerprint,
        shards=len(records),
        shards_total=total,
        rows=sum((Counter(record.rows) for record in records), Counter()),
        unresolved=sum(record.unresolved for record in records),
        journaled=journaled,
        bytes=sum(int(file["bytes"]) for record in records for file in record.files.values()),
        seconds=round(sum(spent.get(r.shard, r.seconds or 0.0) for r in records), 1),
        quarantined=_quarantined(artifact),
        rows_total=rows_total if not done else sum(record.count for record in records),
        rate=None if done or speed.rate is None else round(speed.rate, 3),
        eta=None if done or speed.eta is None else round(speed.eta, 1),
        idle=None if speed.changed is None else round(max(0.0, time.time() - speed.changed), 1),
    )


def _rows_total(artifact: Artifact, records: list[ShardRecord], shards: int | None) -> int | None:
    """Expected rows: the input's if it can be read, else extrapolated from the committed shards."""
    known = rows_of_input(artifact)
    if known is not None or not records or shards is None:
        return known
    return round(sum(record.count for record in records) / len(records) * shards)


def _quarantined(artifact: Artifact) -> dict[str, str]:
    """Quarantined shards, by name; without those that a new run is retrying at the moment."""
    try:
        return artifact.quarantined()
    except (OSError, ValueError):
        return {}


def _journaled(artifact: Artifact) -> int:
    """Lines in journals, without headers. Only counted, since a writer may be appending right now."""
    folder = artifact.folder.private("journal")
    return sum(max(0, _lines(path) - 1) for path in folder.glob("*.jsonl")) if folder.is_dir() else 0


def _lines(path: Path) -> int:
    """Number of whole lines of a file; 0 if it is gone, like a journal after its commit."""
    try:
        with open_local(str(path)) as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except (OSError, Refused):
        return 0


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunState:
    """A training run after ``step`` of ``steps`` steps. ``rate``: steps per second.

    ``reward``: mean of the last step's captions; ``tokens``: their mean length; ``validation``: latest metrics;
    ``best``: the best checkpoint by validation, with its metric.
    """

    step: int
    steps: int | None
    checkpoint: str | None
    reward: float | None
    tokens: float | None
    validation: dict[str, float]
    rate: float | None
    eta: float | None
    idle: float | None
    best: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the last step's checkpoint exists."""
        return self.checkpoint is not None and self.steps == int(self.checkpoint.rpartition("-")[2])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "complete": self.complete}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Log of a run: an entry per step and validation; lines that are not JSON are skipped."""
    return _entries(run / STEPS)


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        lines = read_log(file).split(b"\n")[:-1]
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = bounded_json.parse(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def validation_of(entry: dict[str, Any]) -> dict[str, float]:
    """Validation metrics of a log entry, by name."""
    named = {name.removeprefix("validation/"): value for name, value in entry.items() if name.startswith("validation/")}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def run_state(run: Path) -> RunState:
    """Read a training run's state."""
    entries = read_metrics(run)
    trained = [entry for entry in entries if "reward" in entry]
    last: dict[str, Any] = trained[-1] if trained else {}
    done = int(last["step"]) + 1 if last else 0
    steps = _steps(run)
    timed = _entries(run / TIMES) or trained  # runs from before that file have times among their metrics
    spent = [sum(v for k, v in entry.items() if k.startswith(SECONDS) and v) for entry in timed[-20:]]
    rate = len(spent) / sum(spent) if sum(spent) > 0 else None
    ended = steps is not None and done >= steps
    try:
        idle = round(max(0.0, time.time() - (run / STEPS).stat().st_mtime), 1)
    except OSError:
        idle = None
    return RunState(
        step=done,
        steps=steps,
        checkpoint=max((p.name for p in run.glob("step-*") if p.name.removeprefix("step-").isdigit()), default=None),
        reward=last.get("reward"),
        tokens=last.get("tokens_per_caption"),
        validation=next((metrics for entry in reversed(entries) if (metrics := validation_of(entry))), {}),
        rate=None if rate is None or ended else round(rate, 5),
        eta=round((steps - done) / rate, 1) if rate and steps is not None and not ended else None,
        idle=idle,
        best=best.line() if (best := read_best(run)) else None,
    )


def _steps(run: Path) -> int | None:
    try:
        said = bounded_json.load(run / RUN).get("steps")
    except (OSError, ValueError, AttributeError):
        return None
    return said if isinstance(said, int) else None
