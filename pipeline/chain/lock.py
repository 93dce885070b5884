"""Lock for one `capipe run` per folder, and handling of stages that a killed run left running."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import BadInput
from ...manifests.files.storage import open_own

LOCK = ".chain.lock"


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the folder's lock during the body, which gets its file handle, so that commands can inherit it.

    A command that outlives a killed run keeps the lock until it ends; this waits for it. If the run itself is active,
    raises BadInput.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = open_own(folder / LOCK)
    try:
        waited = False
        while not _taken(handle):
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
            if owner.isdigit() and _alive(int(owner)):
                raise BadInput(
                    f"{folder}: another capipe run (process {owner}) is at work here; wait for it, or stop it"
                )
            if not waited:
                say(f"a stage of a run that was killed (process {owner or 'unknown'}) is still ending; waiting for it")
                waited = True
            time.sleep(0.2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
