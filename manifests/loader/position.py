"""Where a data set is: its epoch and the samples delivered, shared with its copies in DataLoader workers.

A state is a small JSON object: what decides the order of samples, the epoch, and how many samples of it a rank has
delivered. It is the same on all ranks, since they deliver equal counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import BadInput
from ..fingerprint import differences
from .order import positioned, stream_sizes

VERSION = 1
MAX_WORKERS = 1024
_EPOCH, _SEEN, _DELIVERED, _BATCH, _STREAMS, _USED = range(6)
_RESTART = "load a state of this data set, or begin the epoch anew"


class Position:
    """Numbers in shared memory, so that workers which live on between epochs see them change.

    Cells: the epoch; the workers that iterate now (0: none, the main process does); of a loaded state the samples
    delivered, the batch size and the streams (0: no state); for each worker whether it has begun from the state.
    """

    def __init__(self) -> None:
        self._cells = torch.zeros(_USED + MAX_WORKERS, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._cells[_EPOCH])

    @property
    def workers(self) -> int:
        """DataLoader workers that iterate, 0 if the main process does."""
        return int(self._cells[_SEEN])

    def set_epoch(self, epoch: int) -> None:
        """Another epoch begins at its first sample."""
        if epoch != self.epoch:
            self._cells[_STREAMS] = 0
        self._cells[_EPOCH] = epoch

    def begin(self, worker: int, workers: int, share: Sequence[int]) -> tuple[int, int]:
        """The stream that a worker (0 of 0: the main process) reads now, and where it begins.

        ``share``: sizes of the streams. A loaded state holds for one iteration. After it, the worker that a DataLoader
        asks first has the stream whose batch comes next. Raises BadInput if the state is of other workers.
        """
        self._cells[_SEEN] = workers
        streams = int(self._cells[_STREAMS])
        if not streams or self._cells[_USED + worker]:
            return worker, 0
        if streams != len(share):
            text = f"the state was saved with {streams} DataLoader workers, and there are {max(1, workers)}"
            raise BadInput(f"{text}; use as many, or begin the epoch anew")
        self._cells[_USED + worker] = 1
        at = positioned(share, int(self._cells[_DELIVERED]), int(self._cells[_BATCH]))
        stream = (worker + at.following) % streams
        return stream, at.taken[stream]

    def state(
        self, settings: Mapping[str, Any], delivered: int, batch_size: int, share: Sequence[int]
    ) -> dict[str, Any]:
        """The state after ``delivered`` samples of the epoch. Raises BadInput if no batch ends there."""
        resumed = int(self._cells[_STREAMS])
        if resumed > 1 and batch_size != (before := int(self._cells[_BATCH])):
            raise BadInput(f"batch_size={batch_size}: this epoch began with {before}; change it with the next epoch")
        try:
            positioned(share, delivered, batch_size)
        except ValueError as error:
            raise BadInput(f"delivered={delivered}, batch_size={batch_size}: {error}; count this epoch's") from None
        counts = {"delivered": delivered, "batch_size": batch_size, "streams": len(share) if delivered else 0}
        return {"version": VERSION, "settings": dict(settings), "epoch": self.epoch, **counts}

    def load(self, state: Mapping[str, Any], settings: Mapping[str, Any], share: int) -> None:
        """Go on from a state. ``share``: samples of a rank. Raises BadInput if it is of another data set or damaged."""
        try:
            version, theirs = state["version"], state["settings"]
            numbers = [state[name] for name in ("epoch", "delivered", "batch_size", "streams")]
        except (KeyError, TypeError):
            raise BadInput(f"the state is none of a data set of capipe's; {_RESTART}") from None
        if not isinstance(theirs, Mapping):
            raise BadInput(f"the state is none of a data set of capipe's; {_RESTART}")
        if version != VERSION:
            raise BadInput(f"the state is of version {version!r}, and this is {VERSION}; {_RESTART}")
        if changes := differences(theirs, settings):
            raise BadInput(f"the state is of another data set or order ({'; '.join(changes)}); {_RESTART}")
        epoch, delivered, batch_size, streams = (number if type(number) is int else -1 for number in numbers)
        sound = epoch >= 0 and 0 <= delivered <= share and batch_size >= 1 and 0 <= streams <= MAX_WORKERS
        if not sound or not _is_reached(share, delivered, batch_size, streams):
            raise BadInput(f"the state's numbers {numbers} are none that a data set saves; {_RESTART}")
        self._cells.zero_()
        for cell, number in ((_EPOCH, epoch), (_DELIVERED, delivered), (_BATCH, batch_size), (_STREAMS, streams)):
            self._cells[cell] = number


def _is_reached(share: int, delivered: int, batch_size: int, streams: int) -> bool:
    """True if a batch ends after ``delivered`` samples; or if none is delivered, by no streams."""
    if not streams:
        return not delivered
    try:
        positioned(stream_sizes(share, streams), delivered, batch_size)
    except ValueError:
        return False
    return True
