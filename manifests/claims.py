"""Claims: assignment of shards to runs that share one output folder, so that no shard is committed twice.

Three kinds of small files in ``_capipe/``. ``owners/<run>.json`` identifies a run's process; its modification time is
the run's heartbeat. ``claims/<shard>.json`` names the run that holds a shard, by a token that is new each time the
shard is assigned to a worker. ``guard`` is empty and locked briefly: by a process that changes a claim, and by one that
commits, from the check of the claim to the line in the manifest. A slow worker that was presumed dead finds another
token there, and commits nothing.

A run is dead if its process is gone (detected at once on the same machine) or if it has had no heartbeat for
:data:`LEASE_SECONDS`, by the clock that stamps the folder's files. Any run that needs its shard then replaces the
claim.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CapipeError
from .files import bounded_json
from .files.storage import PRIVATE, Folder, clear, create, open_own, write_new
from .files.tar import printable

LEASE_SECONDS = 60.0  # without a heartbeat, before a run on another machine counts as dead
BEAT_SECONDS = 10.0
CLAIMS, OWNERS = "claims", "owners"
_RUN = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(r"([0-9a-f]{16})-[0-9]{1,18}")  # run id, and a number unique within the run


class ClaimLost(CapipeError):
    """The shard now belongs to another worker; this worker's version must not be committed."""


@dataclass(frozen=True)
class Owner:
    """A process that runs a stage. ``machine``: its boot and process namespace; ``born``: start in ticks since boot."""

    run: str
    host: str
    pid: int
    machine: str | None
    born: str | None

    @classmethod
    def this(cls) -> Owner:
        return cls(uuid.uuid4().hex[:16], socket.gethostname(), os.getpid(), _machine(), _born(os.getpid()))

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


@contextmanager
def guard(folder: Folder) -> Iterator[None]:
    """Exclusive right to change claims or to commit, on all machines whose locks reach this folder."""
    handle = open_own(folder.private_to_write("guard"))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def holding(folder: Folder, shard: str, token: str | None) -> Iterator[None]:
    """Commit inside this context: the claim cannot change. Raises ClaimLost if ``token`` is outdated (None: no claims).

    An object store has no locks; there the claim is only checked.
    """
    if token is None:
        yield
        return
    with guard(folder) if folder.is_local else contextlib.nullcontext():
        if _claim(folder, shard).get("token") != token:
            text = f"{folder.url}: shard {shard} was given to another worker; this one was thought to be dead"
            raise ClaimLost(f"{text}, and commits nothing")
        yield


def scratch_of(token: str | None) -> str:
    """The private folder where a shard is written before its commit: one for each claim."""
    return "tmp" if token is None else f"tmp/{token}"


def living(folder: Folder) -> list[Owner]:
    """Runs that share the folder and may be alive, this process's own included."""
    owners = [_owner(folder, name) for name in _names(folder)]
    return [owner for owner in owners if owner is not None and _lives(folder, owner)]


def _names(folder: Folder) -> list[str]:
    path = folder.private(OWNERS)
    return sorted(file.stem for file in path.glob("*.json") if _RUN.fullmatch(file.stem)) if path.is_dir() else []


def _owner(folder: Folder, run: str) -> Owner | None:
    """A run by its owner file; None if it has ended, or its file is incomplete (power loss) or not one of ours."""
    if not _RUN.fullmatch(run):
        return None
    try:
        owner = Owner(**bounded_json.load(folder.private(f"{OWNERS}/{run}.json")))
    except (OSError, ValueError, TypeError):
        return None
    texts = isinstance(owner.host, str), *(isinstance(value, str | None) for value in (owner.machine, owner.born))
    return owner if owner.run == run and type(owner.pid) is int and owner.pid > 0 and all(texts) else None


def _lives(folder: Folder, owner: Owner | None) -> bool:
    if owner is None or owner.is_gone:
        return False
    try:
        beat = folder.private(f"{OWNERS}/{owner.run}.json").stat().st_mtime
    except OSError:
        return False
    return _now(folder) - beat <= LEASE_SECONDS


def _now(folder: Folder) -> float:
    """The time by the clock that stamps this folder's files: the clocks of machines may differ, this one is common."""
    handle = open_own(folder.private_to_write("guard"))
    try:
        os.utime(handle)
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _claim(folder: Folder, shard: str) -> dict[str, Any]:
    """A shard's claim; empty if there is none, or it is incomplete or malformed: its token is used as a folder name."""
    name = f"{PRIVATE}/{CLAIMS}/{shard}.json"
    try:
        claim = bounded_json.load_from(folder, name)
        token = _TOKEN.fullmatch(claim["token"])
        return claim if token is not None and token[1] == claim["run"] else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


class Claims:
    """A run's own claims, and the thread that renews them. All methods may be called from any thread.

    Object stores are not shared: there, claims only tell a run's own workers apart, and the run is their only writer.
    """

    def __init__(self, folder: Folder) -> None:
        self.owner = Owner.this()
        self._folder, self._count = folder, itertools.count()
        self._tokens: dict[str, str] = {}
        self._over = threading.Event()
        if folder.is_local:
            folder.private_folder(CLAIMS)
            folder.private_folder(OWNERS)
            self._sign()
            threading.Thread(target=self._beat, daemon=True).start()
        else:
            folder.remove(f"{PRIVATE}/{CLAIMS}")  # of a run that has ended: its remaining workers commit nothing

    @property
    def _card(self) -> Path:
        return self._folder.private(f"{OWNERS}/{self.owner.run}.json")

    def _sign(self) -> None:
        write_new(
            self._folder.private_to_write(f"{OWNERS}/{self.owner.run}.json"), json.dumps(asdict(self.owner)).encode()
        )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a short outage of a share; a longer one ends the lease
                try:
                    os.utime(self._card)
                except FileNotFoundError:
                    self._sign()

    def take(self, shard: str) -> str | None:
        """Claim a shard; returns the claim's token, or None if a living run has it.

        Whether it is already committed must be checked afterwards: a run commits before it releases its claim.
        """
        token = f"{self.owner.run}-{next(self._count)}"
        data = json.dumps({"token": token, "run": self.owner.run, "host": self.owner.host, "pid": self.owner.pid})
        if not self._folder.is_local:
            self._folder.write(f"{PRIVATE}/{CLAIMS}/{shard}.json", data.encode())
        else:
            with guard(self._folder):
                if not self._take_locally(shard, token, data.encode()):
                    return None
        self._tokens[shard] = token
        return token

    def _take_locally(self, shard: str, token: str, data: bytes) -> bool:
        path = self._folder.private_to_write(f"{CLAIMS}/{shard}.json")
        try:
            with create(path) as file:
                file.write(data)
            return True
        except FileExistsError:
            claim = _claim(self._folder, shard)
        if _lives(self._folder, _owner(self._folder, str(claim.get("run")))):
            return False
        write_new(path, data)
        if claim:
            clear(self._folder.private_to_write(scratch_of(claim["token"])))
        return True

    def holder(self, shard: str) -> Owner | None:
        """The run that has a shard, if any."""
        return _owner(self._folder, str(_claim(self._folder, shard).get("run")))

    def release(self, shard: str) -> None:
        """Release a shard, done or not; does nothing if another run has taken it over."""
        token = self._tokens.pop(shard, None)
        if token is None:
            return
        with guard(self._folder) if self._folder.is_local else contextlib.nullcontext():
            if _claim(self._folder, shard).get("token") == token:
                self._folder.remove(f"{PRIVATE}/{CLAIMS}/{shard}.json")

    def close(self) -> None:
        """Release everything and leave; safe to call twice."""
        self._over.set()
        for shard in list(self._tokens):
            self.release(shard)
        if self._folder.is_local:
            self._card.unlink(missing_ok=True)
