"""Messages between a worker and its runner: small and picklable, without pixels or rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ...manifests.manifest import ShardRecord


class Unit(Protocol):
    """What a worker is given to do: an input shard, or a task."""

    @property
    def name(self) -> str: ...


AnyUnit = TypeVar("AnyUnit", bound=Unit)


@dataclass(frozen=True)
class ShardTask:
    """A task of a job without a model. ``name``: under which it is claimed and quarantined; ``shards``: those it
    commits; ``work``: for the function that does it; ``over``: the committed versions that it replaces."""

    name: str
    shards: tuple[str, ...]
    work: Any
    over: tuple[ShardRecord, ...] = ()


@dataclass(frozen=True)
class Assignment(Generic[AnyUnit]):
    """A shard, or task, to do. ``claim``: in a shared folder, the token that must still be valid at commit."""

    shard: AnyUnit
    claim: str | None = None


@dataclass(frozen=True)
class Ready:
    """The model is loaded and rows are accepted. None: there is no model, and only its tasks can end the worker."""

    seconds: float | None


@dataclass(frozen=True)
class Want:
    """The worker has room for another shard."""


@dataclass(frozen=True)
class Pulse:
    """Progress since the last pulse, and how full the worker's pipeline is now.

    ``rows``: finished rows by status. ``recalled``: of these, rows taken from the journal. ``decoding`` and
    ``in_engine``: rows in that stage; ``concurrency``: rows that the engine accepts at once;
    ``committing``: shards being written.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    recalled: int = 0
    tokens: int = 0
    requests: int = 0
    decoding: int = 0
    in_engine: int = 0
    concurrency: int = 0
    committing: int = 0


@dataclass(frozen=True)
class ShardDone:
    record: ShardRecord


@dataclass(frozen=True)
class TaskDone:
    """A task's shards are committed."""

    task: str
    records: Sequence[ShardRecord]


@dataclass(frozen=True)
class ShardFailed:
    """``final``: another attempt cannot succeed (a damaged input)."""

    shard: str
    reason: str
    final: bool = False


@dataclass(frozen=True)
class ShardLost:
    """The shard was not committed, because another worker took it over."""

    shard: str


@dataclass(frozen=True)
class DoneElsewhere:
    """Another process that shares the folder committed a shard of ours. Sent by runners, not workers."""

    record: ShardRecord


@dataclass(frozen=True)
class Note:
    """A notice for the user."""

    text: str


@dataclass(frozen=True)
class WorkerFailed:
    """The worker exits. ``final``: a retry would not help (a missing model, a full disk)."""

    reason: str
    exit_code: int
    final: bool


Event = Ready | Want | Pulse | ShardDone | TaskDone | ShardFailed | ShardLost | WorkerFailed | DoneElsewhere | Note
