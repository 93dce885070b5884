"""The guard of a local folder: the right to change claims or to commit, for one process at a time.

The file ``_capipe/guard`` is locked briefly, and names the process that locked it last. On object stores there are no
locks, and none is needed: a commit there is a conditional creation. Only the beginnings and ends of runs on one machine
are guarded for a store, too, by a file in the user's cache, where their scratch files and journals are.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ..files.locks import UNLIMITED, Patience, wait_for
from ..files.storage import Folder, open_own
from ..files.tar import printable

GUARD = "guard"
_LONGEST = 200  # bytes of a holder's name


@contextmanager
def guard(folder: Folder, patience: Patience = UNLIMITED) -> Iterator[None]:
    """Exclusive right to change claims or to commit, on all machines whose locks reach this folder; nothing in a store.

    Raises LockHeld if another process has it for longer than the ``patience``.
    """
    with threshold(folder, patience) if folder.is_local else contextlib.nullcontext():
        yield


@contextmanager
def threshold(folder: Folder, patience: Patience = UNLIMITED) -> Iterator[None]:
    """Exclusive right to begin or to end a run: as :func:`guard`, and for a store among the processes of this machine.

    Raises LockHeld if another process has it for longer than the ``patience``.
    """
    handle = open_own(folder.private_to_write(GUARD))
    try:
        wait_for(handle, folder.url, patience, lambda: _holder(handle))
        with contextlib.suppress(OSError):  # a full disk: only its name is missing then
            os.ftruncate(handle, os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0))
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    return printable(os.pread(handle, _LONGEST, 0).decode("utf-8", "replace")) or "another process"
