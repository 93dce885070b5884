"""The right to write to a folder: for one run alone, or for several that all share it.

On this machine, and wherever its locks reach, the kernel's lock on ``_capipe/lock`` (of a store: in the user's cache)
decides; it ends with its process, so it is never stale. Runs on other machines are known by their heartbeat.
"""

from __future__ import annotations

import fcntl
import os

from ...errors import BadInput
from ..files.storage import PRIVATE, Folder, clear, open_own
from ..object_store.commits import clear_attempts
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
        if self.alone:
            self.clear()

    def _acquired(self) -> bool:
        alone = self._locked(fcntl.LOCK_EX)
        if not self._folder.is_local and self._folder.is_shared:
            self.presence = Presence(self._folder, shares=self._shared)
        others = self._others()
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

    def is_last(self) -> bool:
        """True if no other run writes there any more; this one must not, either. Of two that end at once in a store,
        where no guard orders them, at least one is the last: a run leaves before it looks again."""
        if self.presence is None:
            return (not self._shared or self._locked(fcntl.LOCK_EX)) and not self._others()
        if not self._others():
            return True
        own = self.presence.owner
        self.presence.close()
        return all(owner == own for owner in living(self._folder))

    def clear(self) -> None:
        """Remove leftovers of dead runs; no other run may be at work."""
        clear(self._folder.private_to_write("tmp"))
        if self._folder.is_local:
            for name in (CLAIMS, OWNERS):
                clear(self._folder.private_to_write(name))
            return
        self._folder.remove(f"{PRIVATE}/{CLAIMS}")
        own = None if self.presence is None else f"{self.presence.owner.run}.json"
        for name in self._folder.names(f"{PRIVATE}/{OWNERS}"):
            if name != own:
                self._folder.remove_file(f"{PRIVATE}/{OWNERS}/{name}")
        clear_attempts(self._folder)

    def close(self) -> None:
        """Release the lock; safe to call twice."""
        if self.presence is not None:
            self.presence.close()
            self.presence = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
