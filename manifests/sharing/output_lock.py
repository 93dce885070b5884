"""The right to write to a folder: for one run alone, or for several that all share it.

On this machine, and wherever its locks reach, the kernel's lock on ``_capipe/lock`` (of a store: in the user's cache)
decides; it ends with its process, so it is never stale. Runs on other machines are known by their heartbeat.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass

from ...errors import BadInput
from ..files.storage import PRIVATE, Folder, clear, open_own
from ..object_store.commits import Leftovers
from .claims import CLAIMS
from .owners import OWNERS, Owner, Presence, living

LOCK = "lock"


class OutputLock:
    """The lock of one run. ``alone``: no other run was there when it was taken; leftovers of dead ones are removed."""

    def __init__(self, folder: Folder, shared: bool) -> None:
        """Raises BadInput if another run is writing there, unless both are ``shared``."""
        self._folder, self._shared = folder, shared
        self.presence: Presence | None = None
        self._handle = open_own(folder.private_to_write(LOCK))
        try:
            self.alone = self._acquired()
        except BaseException:
            self.close()
            raise

    def _acquired(self) -> bool:
        alone = self._locked(fcntl.LOCK_EX)
        left = _Left.of(self._folder) if alone else None
        if not self._folder.is_local and self._folder.is_shared:
            self.presence = Presence(self._folder, shares=self._shared)
        others = self._others()
        if left is not None and not others:  # while the lock is exclusive
            left.remove(self._folder)
        if self._shared:
            refused = not self._locked(fcntl.LOCK_SH) or any(not other.shares for other in others)
        else:
            refused = not alone or bool(others)
        if refused:
            who = f" ({', '.join(map(str, others))}; runs share a folder where all have --share)" if others else ""
            text = f"{self._folder.url}: another capipe process is writing here{who}; wait for it, or stop it"
            raise BadInput(text)
        return alone and not others

    def _others(self) -> list[Owner]:
        own = None if self.presence is None else self.presence.owner
        return [owner for owner in living(self._folder, self.presence) if owner != own]

    def _locked(self, how: int) -> bool:
        try:
            fcntl.flock(self._handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def clear_if_last(self) -> bool:
        """Remove what dead runs have left if no other run writes there any more; this one must not, either. Returns
        whether it is so. Of two that end at once in a store, where no guard orders them, at least one is the last: a
        run leaves before it looks again."""
        left = _Left.of(self._folder)
        if last := self._is_last():
            left.remove(self._folder)
        return last

    def _is_last(self) -> bool:
        if self.presence is None:
            return (not self._shared or self._locked(fcntl.LOCK_EX)) and not self._others()
        if not self._others():
            return True
        own = self.presence.owner
        self.presence.close()
        return all(owner == own for owner in living(self._folder))

    def close(self) -> None:
        """Release the lock; safe to call twice."""
        if self.presence is not None:
            self.presence.close()
            self.presence = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@dataclass(frozen=True)
class _Left:
    """What runs have left in a folder: to be listed before it is asked who lives. Whoever comes later is not in it, so
    nothing of theirs is removed."""

    names: tuple[str, ...]  # of claims and of runs' cards
    commits: Leftovers | None  # in a store

    @classmethod
    def of(cls, folder: Folder) -> _Left:
        folders = [f"{PRIVATE}/{CLAIMS}", f"{PRIVATE}/{OWNERS}"]
        names = tuple(f"{place}/{name}" for place in folders for name in folder.names(place))
        return cls(names, None if folder.is_local else Leftovers.of(folder))

    def remove(self, folder: Folder) -> None:
        """Remove it; no run that was there at the listing may be at work."""
        clear(folder.private_to_write("tmp"))
        if self.commits is not None:
            for name in self.names:
                folder.remove_file(name)
            self.commits.remove(folder)
            return
        for name in self.names:
            clear(folder.to_write(name))
        for name in (CLAIMS, OWNERS):
            with contextlib.suppress(OSError):  # not there, or somebody writes to it again
                folder.private(name).rmdir()
