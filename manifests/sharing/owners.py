"""Runs that write to a folder: a card for each in ``_capipe/owners/``, whose last change is the run's heartbeat.

A run is dead if its process is gone (detected at once on the same machine) or if it has had no heartbeat for
:data:`LEASE_SECONDS`. Heartbeats and the present are both stamped by the clock of the folder's file system or store:
no machine's own clock takes part.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..files import bounded_json
from ..files.storage import PRIVATE, Folder, open_own, write_new
from ..files.store_errors import StoreUnavailable
from ..files.tar import printable

LEASE_SECONDS = 60.0  # without a heartbeat, before a run on another machine counts as dead
BEAT_SECONDS = 10.0
OWNERS = "owners"
_RUN = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Owner:
    """A process that runs a stage. ``machine``: its boot and process namespace; ``born``: start in ticks since boot.

    ``shares``: it lets others write to the same folder.
    """

    run: str
    host: str
    pid: int
    machine: str | None
    born: str | None
    shares: bool = True

    @classmethod
    def this(cls, shares: bool = True) -> Owner:
        run = uuid.uuid4().hex[:16]
        return cls(run, socket.gethostname(), os.getpid(), _machine(), _born(os.getpid()), shares)

    @property
    def is_gone(self) -> bool:
        """True if certainly dead: it ran on this machine, and its pid is gone or belongs to another process."""
        return self.machine is not None and self.machine == _machine() and self.born != _born(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"


@cache
def _machine() -> str | None:
    """Identifier that is equal in two processes exactly if they see each other's pids; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """Start time of a process; None if there is none. A killed process not yet waited for counts as none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Presence:
    """This run's card, and the thread that renews it. In a store a card is written anew for each heartbeat."""

    def __init__(self, folder: Folder, *, shares: bool = True) -> None:
        self.owner = Owner.this(shares)
        self._folder, self._name = folder, f"{OWNERS}/{self.owner.run}.json"
        self._over = threading.Event()
        self.signed = 0.0  # monotonic clock
        if folder.is_local:
            folder.private_folder(OWNERS)
        self._sign()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def _card(self) -> Path:
        return self._folder.private(self._name)

    def _sign(self) -> None:
        data = json.dumps(asdict(self.owner)).encode()
        if self._folder.is_local:
            write_new(self._folder.private_to_write(self._name), data)
        else:
            self._folder.write(f"{PRIVATE}/{self._name}", data)
        self.signed = time.monotonic()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a short outage of a share or a store; a longer one ends the lease
                if not self._folder.is_local:
                    self._sign()
                    continue
                try:
                    os.utime(self._card)
                except FileNotFoundError:
                    self._sign()

    def close(self) -> None:
        """End the heartbeat and remove the card; safe to call twice."""
        self._over.set()
        if self._folder.is_local:
            self._card.unlink(missing_ok=True)
        else:
            with contextlib.suppress(OSError):  # its lease ends by itself
                self._folder.remove_file(f"{PRIVATE}/{self._name}")


def living(folder: Folder, presence: Presence | None = None) -> list[Owner]:
    """Runs that write to the folder and may be alive, this process's own included. ``presence``: this run's card, by
    which a store's present time is known."""
    if folder.is_local:
        owners = [read_owner(folder, run) for run in _local_runs(folder)]
        return [owner for owner in owners if owner is not None and lives(folder, owner)]
    beats = _beats(folder)
    now = _store_time(beats, presence)
    recent = [run for run, beat in sorted(beats.items()) if now - beat <= LEASE_SECONDS]
    owners = [read_owner(folder, run) for run in recent]
    return [owner for owner in owners if owner is not None and not owner.is_gone]


def lives(folder: Folder, owner: Owner | None, presence: Presence | None = None) -> bool:
    """True if a run may be alive."""
    if owner is None or owner.is_gone:
        return False
    if not folder.is_local:
        beats = _beats(folder)
        return owner.run in beats and _store_time(beats, presence) - beats[owner.run] <= LEASE_SECONDS
    try:
        beat = folder.private(f"{OWNERS}/{owner.run}.json").stat().st_mtime
    except OSError:
        return False
    return _file_time(folder) - beat <= LEASE_SECONDS


def read_owner(folder: Folder, run: str) -> Owner | None:
    """A run by its card; None if it has ended, or its card is incomplete (power loss) or not one of ours."""
    if not _RUN.fullmatch(run):
        return None
    try:
        card: Any = bounded_json.load_from(folder, f"{PRIVATE}/{OWNERS}/{run}.json")
        owner = Owner(**card)
    except StoreUnavailable:
        raise
    except (OSError, ValueError, TypeError):
        return None
    texts = isinstance(owner.host, str), *(isinstance(value, str | None) for value in (owner.machine, owner.born))
    sound = type(owner.pid) is int and owner.pid > 0 and type(owner.shares) is bool and all(texts)
    return owner if owner.run == run and sound else None


def _local_runs(folder: Folder) -> list[str]:
    path = folder.private(OWNERS)
    return sorted(file.stem for file in path.glob("*.json") if _RUN.fullmatch(file.stem)) if path.is_dir() else []


def _beats(folder: Folder) -> dict[str, float]:
    """Heartbeats in a store by run, from one listing."""
    stamps = folder.stamps(f"{PRIVATE}/{OWNERS}")
    runs = {name.removesuffix(".json"): beat for name, beat in stamps.items()}
    return {run: beat for run, beat in runs.items() if _RUN.fullmatch(run)}


def _store_time(beats: dict[str, float], presence: Presence | None) -> float:
    """The present by the store's clock: when it stamped this run's card, and how long ago that was. Without a card the
    newest one's: the present is never earlier."""
    if presence is None or presence.owner.run not in beats:
        return max(beats.values(), default=0.0)
    return beats[presence.owner.run] + time.monotonic() - presence.signed


def _file_time(folder: Folder) -> float:
    """The time by the clock that stamps this folder's files: the clocks of machines may differ, this one is common."""
    handle = open_own(folder.private_to_write("guard"))
    try:
        os.utime(handle)
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)
