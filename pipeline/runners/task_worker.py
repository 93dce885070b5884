"""Worker of jobs without a model: writes and commits the shards of one task after the other."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ...errors import CapipeError, DamagedShard, RunFailed
from ...manifests.artifact import Artifact
from ...manifests.files.store_errors import StoreUnavailable
from ...manifests.manifest import ShardRecord
from ...manifests.sharing.claims import Claim, ClaimLost
from .messages import Assignment, Pulse, Ready, ShardFailed, ShardLost, ShardTask, TaskDone, WorkerFailed
from .worker import Channel, Stage, disk_text

FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # neither a retry nor another shard would succeed

TaskIn = TypeVar("TaskIn", contravariant=True)


class ShardWriter(Protocol[TaskIn]):
    """Writes and commits a task's shards. Must be picklable: a module's function, or a partial of one.

    An OSError concerns the output: errors of a source's items are recorded in their rows.
    """

    def __call__(self, task: TaskIn, /, *, artifact: Artifact) -> ShardRecord | Sequence[ShardRecord]: ...


def write_task(
    assignment: Assignment[ShardTask], *, write: ShardWriter[Any], artifact: Artifact
) -> Sequence[ShardRecord] | None:
    """Write a task's shards in a worker process. None: another process took the task over, and nothing is committed.

    An error of the output ends the run, since others would meet it, too; so does a store that does not answer. Another
    error concerns this task's input, and is worth a retry.
    """
    task, token = assignment.shard, assignment.claim
    claim = None if token is None else Claim(task.name, token)
    try:
        written = write(task.work, artifact=artifact.under(claim))
    except ClaimLost:
        return None
    except OSError as error:
        folder = artifact.folder.fs.url(artifact.folder.path)
        of_the_output = str(error.filename or "").startswith(f"{folder}/")
        if of_the_output or error.errno in FATAL_ERRNOS or isinstance(error, StoreUnavailable):
            raise RunFailed(disk_text(error, artifact.url)) from error
        raise
    return [written] if isinstance(written, ShardRecord) else written


@dataclass(frozen=True)
class TaskJob:
    """Everything that a worker on another machine needs. ``reads``: local paths of the input, which it must see."""

    write: ShardWriter[Any]
    reads: tuple[str, ...] = ()

    async def work(self, artifact: Artifact, channel: Channel) -> WorkerFailed | None:
        """Do tasks until the channel has no more, or a stop. Returns the failure that ended the worker, if any."""
        channel.send(Ready(None))
        while (assignment := await channel.next_shard()) is not None:
            if assignment == "wait":
                continue
            name = assignment.shard.name
            try:
                records = await self._written(assignment, artifact)
            except DamagedShard as error:
                channel.send(ShardFailed(name, str(error), final=True))
                continue
            except CapipeError as error:
                return WorkerFailed(str(error), error.exit_code, final=True)
            except Exception as error:  # raised by the stage
                channel.send(ShardFailed(name, reason_of(error)))
                continue
            if records is None:
                channel.send(ShardLost(name))
                continue
            for record in records:
                channel.send(Pulse(rows=record.rows))
            channel.send(TaskDone(name, records))
        return None

    async def _written(self, assignment: Assignment[ShardTask], artifact: Artifact) -> Sequence[ShardRecord] | None:
        """In a thread, which a cancelled worker waits for."""
        writing = asyncio.to_thread(write_task, assignment, write=self.write, artifact=artifact)
        task = asyncio.ensure_future(writing)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise


Job = Stage | TaskJob


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
