"""Progress of a run: counts, throughput, ETA and bottleneck."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...terminal import escaped, print_err
from .messages import DoneElsewhere, Event, Note, Pulse, Ready, ShardDone, ShardFailed, ShardLost, WorkerFailed

LOG_SECONDS = 10.0  # between log lines if the output is not a terminal


@dataclass
class Progress:
    """A run's state, updated by its events.

    ``rows_total``: None if unknown (tars of other tools); the ETA is then estimated from the committed shards.
    """

    stage: str
    shards_total: int | None  # None while a source is still being read
    shards_done: int = 0
    rows_total: int | None = None
    rows_before: int = 0  # committed by earlier runs, or by other processes that share the folder
    started: float = field(default_factory=time.monotonic)
    ready: float | None = None  # when the first worker's model was loaded
    rows: Counter[str] = field(default_factory=Counter)
    recalled: int = 0
    tokens: int = 0
    requests: int = 0
    notes: list[str] = field(default_factory=list)
    _last: float | None = None  # when rows or a shard were last finished
    _committed_rows: int = 0
    _committed_shards: int = 0
    _bottlenecks: Counter[str] = field(default_factory=Counter)

    def update(self, event: Event) -> None:
        if isinstance(event, Ready):
            self.ready = self.ready or time.monotonic()
            if event.seconds is not None:
                self.notes.append(f"engine ready after {event.seconds:.1f} s")
        elif isinstance(event, Pulse):
            self.rows.update(event.rows)
            self.recalled += event.recalled
            self.tokens += event.tokens
            self.requests += event.requests
            self._bottlenecks[_bottleneck(event)] += 1
            if event.rows:
                self._last = time.monotonic()
        elif isinstance(event, ShardDone):
            self._last = time.monotonic()
            self.shards_done += 1
            self._committed_shards += 1
            self._committed_rows += event.record.count
        elif isinstance(event, DoneElsewhere):
            self.shards_done += 1
            self.rows_before += event.record.count
        elif isinstance(event, Note):
            self.notes.append(event.text)
        elif isinstance(event, ShardLost):
            self.notes.append(f"shard {event.shard} was taken over by another process; nothing of ours was committed")
        elif isinstance(event, ShardFailed):
            self.notes.append(f"shard {event.shard} failed: {event.reason}")
        elif isinstance(event, WorkerFailed):
            self.notes.append(f"{event.reason}; another worker takes over")

    @property
    def finished_rows(self) -> int:
        """Rows finished by this run, without those recalled from journals."""
        return sum(self.rows.values()) - self.recalled

    @property
    def seconds(self) -> float:
        """Time since the first engine was ready."""
        return time.monotonic() - (self.ready or self.started)

    def rate(self) -> float:
        """Rows per second of this run."""
        return self.finished_rows / max(self.seconds, 1e-9) if self.ready else 0.0

    def eta(self) -> float | None:
        """Seconds left; None while unknown."""
        total = self.rows_total
        if total is None and self._committed_shards and self.shards_total is not None:
            total = round(self._committed_rows / self._committed_shards * self.shards_total)
        if total is None or not self.rate():
            return None
        return max(0, total - self.rows_before - sum(self.rows.values())) / self.rate()

    def bottleneck(self) -> str:
        """Most frequent bottleneck over all pulses: read, decode, engine or write."""
        return self._bottlenecks.most_common(1)[0][0] if self._bottlenecks else "loading the model"

    def line(self) -> str:
        """One line for logs: shards, rows by status, rates, ETA, bottleneck."""
        statuses = " ".join(f"{status}={count}" for status, count in sorted(self.rows.items()))
        speed = f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s, " if self.tokens else ""
        return (
            f"{self.stage}: shards {self.shards_done}/{self.shards_total or '?'}, rows {statuses or 0}, "
            f"{self.rate():.1f} images/s, {speed}ETA {clock(self.eta())}, bottleneck {self.bottleneck()}"
        )

    def finished_line(self) -> str:
        """Last line of a run; its time ends at the last commit."""
        seconds = max((self._last or 0.0) - (self.ready or self.started), 1e-9)
        requests = f", {self.requests} engine requests, {self.tokens} tokens" if self.requests else ""
        recalled = f", {self.recalled} taken from journals" if self.recalled else ""
        rate = self.finished_rows / seconds
        return f"{self.stage}: {self.finished_rows} images in {seconds:.1f} s ({rate:.1f} images/s{requests}){recalled}"

    def panel(self) -> Group:
        """The live display."""
        table = Table.grid(padding=(0, 2))
        table.add_row(
            Text(self.stage, style="bold"),
            ProgressBar(total=self.shards_total, completed=self.shards_done, width=40),
            f"{self.shards_done}/{self.shards_total or '?'} shards",
            f"ETA {clock(self.eta())}",
        )
        notes = (Text(escaped(note)) for note in self.notes[-3:])
        return Group(table, Text(self.line().partition(", ")[2], style="dim"), *notes)

    @contextmanager
    def shown(self, console: Console) -> Iterator[Callable[[Event], None]]:
        """Show progress while the body runs, live on a terminal, else as log lines; yields the ``report`` callback."""
        if console.is_terminal:
            with Live(get_renderable=self.panel, console=console, refresh_per_second=4, transient=True):
                yield self.update
        else:
            yield _LineLogger(self).report


class _LineLogger:
    """Updates a :class:`Progress`; prints its line every :data:`LOG_SECONDS` and its notes at once."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last, self._notes = progress, time.monotonic(), 0

    def report(self, event: Event) -> None:
        self._progress.update(event)
        for note in self._progress.notes[self._notes :]:
            print_err(f"{self._progress.stage}: {note}")
        self._notes = len(self._progress.notes)
        if time.monotonic() - self._last > LOG_SECONDS:
            self._last = time.monotonic()
            print_err(self._progress.line())


def _bottleneck(pulse: Pulse) -> str:
    """Bottleneck at a pulse: the engine if it is full, else a stage before or after it."""
    if pulse.in_engine >= pulse.concurrency > 0:
        return "engine"
    if pulse.committing > 1:
        return "write"
    return "decode" if pulse.decoding > pulse.in_engine else "read"


def clock(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss; a question mark for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
