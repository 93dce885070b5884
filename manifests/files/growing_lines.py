"""Lines of a file that only grows, read as far as they were not read before."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .storage import Folder

_TAIL = 256  # bytes before those not read yet, by which a file that grew is told from one that was rewritten


class GrowingLines:
    """The file ``name`` of a folder. After its last newline is nothing, or a torn line, which is not read yet."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self.forget()

    def forget(self) -> None:
        """Read from the start next time."""
        self._seen, self._stamp, self._tail = 0, (0, 0, 0), b""

    def read(self) -> tuple[list[bytes], bool]:
        """Whole lines after those read before, and False; or all of them and True, the first time and if the file did
        anything but grow. Raises OSError, NotAFile."""
        folder = self._folder
        if not folder.is_local:
            return (folder.read_bytes(self._name).split(b"\n")[:-1] if folder.exists(self._name) else []), True
        try:
            with folder.open(self._name) as file:
                status = os.fstat(file.fileno())
                stamp = status.st_ino, status.st_size, status.st_mtime_ns
                if stamp == self._stamp:
                    return [], False
                anew = stamp[0] != self._stamp[0] or status.st_size <= self._stamp[1] or not self._continues(file)
                if anew:
                    self.forget()
                file.seek(self._seen)
                data = file.read()
        except FileNotFoundError:
            self.forget()
            return [], True
        whole = data[: data.rfind(b"\n") + 1]
        self._seen, self._stamp, self._tail = self._seen + len(whole), stamp, (self._tail + whole)[-_TAIL:]
        return whole.split(b"\n")[:-1], anew

    def _continues(self, file: BinaryIO) -> bool:
        """True if the last bytes that were read are still there."""
        file.seek(self._seen - len(self._tail))
        return file.read(len(self._tail)) == self._tail


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the search for garbage while many lines become objects that are all kept: it would walk through them again
    and again, and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
