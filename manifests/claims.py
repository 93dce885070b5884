"""Claims: who works on which shard, so that several runs can share one output folder and no shard is committed twice.

Three kinds of small files in ``_capipe/``. ``owners/<run>.json`` says which process a run is; its modification time is
the run's heartbeat. ``claims/<shard>.json`` says which run has a shard, by a token that is new each time the shard is
handed to a worker. ``guard`` is empty and locked for moments: who changes a claim holds it, and who commits holds it
from the look at the claim to the line in the manifest. A worker that was thought dead and was only slow finds another
token there, and commits nothing.

A run is dead when its process is gone (seen at once on the machine it ran on) or its heart has not beaten for
:data:`LEASE_SECONDS`, by the clock that stamps the folder's files. Then whoever wants its shard replaces the claim.
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
_TOKEN = re.compile(r"([0-9a-f]{16})-[0-9]{1,18}")  # its run, and a number that is new in it


class ClaimLost(CapipeError):
    """The shard belongs to another worker by now; what this one made of it must not be committed."""


@dataclass(frozen=True)
class Owner:
    """A process that runs a stage. ``machine``: of this boot and process namespace; ``born``: ticks since the boot."""

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
        """Surely dead: it ran on this very machine, and its process is no more, or its number is another one's."""
        return self.machine is not None and self.machine == _machine() and self.born != _born(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"


@cache
def _machine() -> str | None:
    """Equal in two processes exactly where they see each other's process numbers; None where that cannot be said."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """When a process started; None where there is none. One that was killed and not yet waited for is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@contextmanager
def guard(folder: Folder) -> Iterator[None]:
    """Be the only one to change claims or to commit, on all machines whose locks reach this folder."""
    handle = open_own(folder.private_to_write("guard"))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def holding(folder: Folder, shard: str, token: str | None) -> Iterator[None]:
    """Commit inside: the shard's claim cannot change. Raises ClaimLost where it is not ``token``'s (None: no claims).

    An object store has no locks; there a claim is only looked at.
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
    """The private folder where a shard is written before its commit: each claim has a place of its own."""
    return "tmp" if token is None else f"tmp/{token}"


def living(folder: Folder) -> list[Owner]:
    """Runs that share the folder and may be alive, this process's own included."""
    owners = [_owner(folder, name) for name in _names(folder)]
    return [owner for owner in owners if owner is not None and _lives(folder, owner)]


def _names(folder: Folder) -> list[str]:
    path = folder.private(OWNERS)
    return sorted(each.stem for each in path.glob("*.json") if _RUN.fullmatch(each.stem)) if path.is_dir() else []


def _owner(folder: Folder, run: str) -> Owner | None:
    """A run by its owner file; None where it left, or its file was never finished (a power cut) or is none of ours."""
    if not _RUN.fullmatch(run):
        return None
    try:
        owner = Owner(**bounded_json.load(folder.private(f"{OWNERS}/{run}.json")))
    except (OSError, ValueError, TypeError):
        return None
    texts = isinstance(owner.host, str), *(isinstance(each, str | None) for each in (owner.machine, owner.born))
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
    """The time by the clock that stamps this folder's files: another machine's may go wrong, theirs is the same."""
    handle = open_own(folder.private_to_write("guard"))
    try:
        os.utime(handle)
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _claim(folder: Folder, shard: str) -> dict[str, Any]:
    """A shard's claim; empty where there is none, or none that was written to its end, or one that is not of our form:
    its token is the name of a folder."""
    name = f"{PRIVATE}/{CLAIMS}/{shard}.json"
    try:
        found = bounded_json.load_from(folder, name)
        token = _TOKEN.fullmatch(found["token"])
        return found if token is not None and token[1] == found["run"] else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


class Claims:
    """A run's own claims, and the thread that keeps them alive. All methods may be called from any thread.

    On an object store there is no sharing: claims only tell a run's own workers apart, and the run is their one writer.
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
            folder.remove(f"{PRIVATE}/{CLAIMS}")  # of a run that is over: whoever still works for it commits nothing

    @property
    def _card(self) -> Path:
        return self._folder.private(f"{OWNERS}/{self.owner.run}.json")

    def _sign(self) -> None:
        write_new(
            self._folder.private_to_write(f"{OWNERS}/{self.owner.run}.json"), json.dumps(asdict(self.owner)).encode()
        )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a share that is away for a moment; for longer, the lease runs out
                try:
                    os.utime(self._card)
                except FileNotFoundError:
                    self._sign()

    def take(self, shard: str) -> str | None:
        """Claim a shard; returns the claim's token, or None where a living run has it.

        Whether it is committed by now is to be looked up afterwards: a commit comes before its claim's end.
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
        """Who has a shard, if anybody."""
        return _owner(self._folder, str(_claim(self._folder, shard).get("run")))

    def release(self, shard: str) -> None:
        """Give a shard back, done or not; nothing where another run took it over."""
        token = self._tokens.pop(shard, None)
        if token is None:
            return
        with guard(self._folder) if self._folder.is_local else contextlib.nullcontext():
            if _claim(self._folder, shard).get("token") == token:
                self._folder.remove(f"{PRIVATE}/{CLAIMS}/{shard}.json")

    def close(self) -> None:
        """Give everything back and leave; safe to call twice."""
        self._over.set()
        for shard in list(self._tokens):
            self.release(shard)
        if self._folder.is_local:
            self._card.unlink(missing_ok=True)
