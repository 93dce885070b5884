"""`capipe status`: the state of a run, read from its files alone, so on any machine that sees them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...manifests import times
from ...manifests.artifact import Artifact
from ...manifests.files import bounded_json
from ...manifests.files.allowed import read_log
from ...manifests.files.outside import Refused, open_local
from ...manifests.manifest import ShardRecord
from ...trainer.log import SECONDS, STEPS, TIMES
from .discover import RUN
from .throughput import rows_of_input, throughput


@dataclass(frozen=True)
class State:
    """Counts of an artifact. ``journaled``: rows finished in shards that are not committed yet.

    ``rate`` (rows per second) and ``eta`` (seconds left) are None where nothing is under way or they are unknown;
    ``idle``: seconds since something was last finished, by this machine's clock.
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
        """Every shard committed, every row resolved."""
        return self.shards == self.shards_total and not self.unresolved and not self.quarantined

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": dict(self.rows), "complete": self.complete}


def state(url: str) -> State:
    """Read an artifact's state. Raises BadInput where there is none."""
    return state_of(Artifact.open(url))


def state_of(artifact: Artifact) -> State:
    """The state of an artifact at this moment; it may be written meanwhile."""
    records = list(artifact.committed().values())
    said = artifact.config["run"].get("shards_total")
    total = None if said is None else int(said)
    done, journaled = len(records) == total, _journaled(artifact)
    rows_total = None if done else _rows_total(artifact, records, total)
    found, spent = throughput(artifact, records, journaled, rows_total), times.read(artifact.folder).seconds
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
        rate=None if done or found.rate is None else round(found.rate, 3),
        eta=None if done or found.eta is None else round(found.eta, 1),
        idle=None if found.changed is None else round(max(0.0, time.time() - found.changed), 1),
    )


def _rows_total(artifact: Artifact, records: list[ShardRecord], shards: int | None) -> int | None:
    """Expected rows: the input's where it can be read, else extrapolated from the shards so far."""
    known = rows_of_input(artifact)
    if known is not None or not records or shards is None:
        return known
    return round(sum(record.count for record in records) / len(records) * shards)


def _quarantined(artifact: Artifact) -> dict[str, str]:
    """Shards that failed for good; those of which a new run tries again at this moment are not among them."""
    try:
        return artifact.quarantined()
    except (OSError, ValueError):
        return {}


def _journaled(artifact: Artifact) -> int:
    """Lines in journals, but for each one's header. Only counted: a writer may be appending right now."""
    folder = artifact.folder.private("journal")
    return sum(max(0, _lines(path) - 1) for path in folder.glob("*.jsonl")) if folder.is_dir() else 0


def _lines(path: Path) -> int:
    """Whole lines of a file; none where it is gone, as a journal is after its commit."""
    try:
        with open_local(str(path)) as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except (OSError, Refused):
        return 0


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunState:
    """A training run after ``step`` of ``steps`` steps. ``rate`` in steps per second.

    ``reward``: of the last step's captions; ``tokens``: of one of them, on average; ``validation``: the last figures.
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

    @property
    def complete(self) -> bool:
        """Whether the last checkpoint is that of the last step."""
        return self.checkpoint is not None and self.steps == int(self.checkpoint.rpartition("-")[2])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "complete": self.complete}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The log of a run: an entry for each step and each validation; lines that are no JSON are skipped."""
    return _entries(run / STEPS)


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        lines = read_log(file).split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = bounded_json.parse(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def validation_of(entry: dict[str, Any]) -> dict[str, float]:
    """The validation metrics of a log entry, by name."""
    named = {name.removeprefix("validation/"): value for name, value in entry.items() if name.startswith("validation/")}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def run_state(run: Path) -> RunState:
    """Read a training run's state."""
    entries = read_metrics(run)
    trained = [each for each in entries if "reward" in each]
    last: dict[str, Any] = trained[-1] if trained else {}
    done = int(last["step"]) + 1 if last else 0
    steps = _steps(run)
    timed = _entries(run / TIMES) or trained  # runs from before that file have times among their figures
    spent = [sum(v for k, v in each.items() if k.startswith(SECONDS) and v) for each in timed[-20:]]
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
        validation=next((found for each in reversed(entries) if (found := validation_of(each))), {}),
        rate=None if rate is None or ended else round(rate, 5),
        eta=round((steps - done) / rate, 1) if rate and steps is not None and not ended else None,
        idle=idle,
    )


def _steps(run: Path) -> int | None:
    try:
        said = bounded_json.load(run / RUN).get("steps")
    except (OSError, ValueError, AttributeError):
        return None
    return said if isinstance(said, int) else None
