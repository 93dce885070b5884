"""Claims: assignment of shards to runs that share one output folder, so that no work is done twice.

``claims/<shard>.json`` names the run that holds a shard, by a token that is new each time the shard is assigned to a
worker. A run that is dead (:mod:`.owners`) loses its claims to any run that needs its shard. In a local folder claims
change, and commits are made, under the :mod:`.guard`: a slow worker that was presumed dead finds another token there,
and commits nothing. In a store a claim only saves work: whoever commits first has committed
(:mod:`..object_store.commits`), whatever the claims and clocks say.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import CapipeError
from ..files import bounded_json
from ..files.locks import NOTICE_SECONDS, UNLIMITED, LockHeld, Patience
from ..files.storage import PRIVATE, Folder, clear, create, write_new
from ..files.store_errors import StoreUnavailable
from .guard import guard
from .owners import Owner, Presence, lives, read_owner

CLAIMS = "claims"
PATIENCE = Patience(seconds=0.5)  # of a run's main loop, which has other things to do; it tries again
_WAIT = 0.5  # seconds until a claim that another run has is tried again
_TOKEN = re.compile(r"([0-9a-f]{16})-[0-9]{1,18}")  # run id, and a number unique within the run


class ClaimLost(CapipeError):
    """The shard now belongs to another worker; this worker's version must not be committed."""


@dataclass(frozen=True)
class Claim:
    """A worker's claim. ``shard``: its name, that of the first one if a task writes several."""

    shard: str
    token: str


@contextmanager
def holding(folder: Folder, claim: Claim | None, patience: Patience = UNLIMITED) -> Iterator[None]:
    """Commit inside this context: the claim cannot change. None: no claims.

    Raises ClaimLost if its token is outdated, LockHeld if the ``patience`` ends. A store has no locks; there the claim
    is only checked.
    """
    if claim is None:
        yield
        return
    with guard(folder, patience):
        if _claim(folder, claim.shard).get("token") != claim.token:
            text = f"{folder.url}: shard {claim.shard} was given to another worker; this one was thought to be dead"
            raise ClaimLost(f"{text}, and commits nothing")
        yield


def scratch_of(claim: Claim | None) -> str:
    """The private folder where a shard is written before its commit: one for each claim."""
    return "tmp" if claim is None else f"tmp/{claim.token}"


def _claim(folder: Folder, shard: str) -> dict[str, Any]:
    """A shard's claim; empty if there is none, or it is incomplete or malformed: its token is used as a folder name."""
    try:
        claim = bounded_json.load_from(folder, _name(shard))
        token = _TOKEN.fullmatch(claim["token"])
        return claim if token is not None and token[1] == claim["run"] else {}
    except StoreUnavailable:
        raise
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _name(shard: str) -> str:
    return f"{PRIVATE}/{CLAIMS}/{shard}.json"


@contextmanager
def alone(claims: Claims | None, name: str, patience: Patience = UNLIMITED) -> Iterator[None]:
    """Do the body while no other run that shares the folder does what has this name. None: no other run is there.

    A long wait is reported. Raises LockHeld if the ``patience`` ends.
    """
    started, said = time.monotonic(), False
    while claims is not None and not _taken(claims, name):
        held = LockHeld(claims.where, str(claims.holder(name) or "another process"))
        waited = time.monotonic() - started
        if patience.stopped() or waited > patience.seconds:
            raise held
        if waited > NOTICE_SECONDS and not said:
            said = True
            patience.say(held.waiting)
        time.sleep(_WAIT)
    try:
        yield
    finally:
        if claims is not None:
            claims.release(name)


def _taken(claims: Claims, name: str) -> bool:
    with contextlib.suppress(LockHeld):
        return claims.take(name) is not None
    return False


class _Place(Protocol):
    """Where claims are: files under a guard, or objects created conditionally."""

    def take(self, shard: str, token: str, data: bytes) -> bool: ...

    def release(self, shards: dict[str, str]) -> None: ...


class Claims:
    """A run's own claims, and its :class:`.owners.Presence`. All methods may be called from any thread."""

    def __init__(self, folder: Folder, presence: Presence | None = None, *, shares: bool = True) -> None:
        """``presence``: the run's card, if it has one already; else ``shares``: whether others may write there, too."""
        self._own = presence is None  # closed with the claims
        self.presence = Presence(folder, shares=shares) if presence is None else presence
        self.owner = self.presence.owner
        self._folder, self._count = folder, itertools.count()
        self._tokens: dict[str, str] = {}
        self._place: _Place = _Files(folder, self.presence) if folder.is_local else _Objects(folder, self.presence)

    @property
    def where(self) -> str:
        """The folder, for messages."""
        return self._folder.url

    def take(self, shard: str) -> str | None:
        """Claim a shard; returns the claim's token, or None if a living run has it.

        Whether it is already committed must be checked afterwards: a run commits before it releases its claim. Raises
        LockHeld if another process holds the guard for long; try again later.
        """
        token = f"{self.owner.run}-{next(self._count)}"
        data = json.dumps({"token": token, "run": self.owner.run, "host": self.owner.host, "pid": self.owner.pid})
        if not self._place.take(shard, token, data.encode()):
            return None
        self._tokens[shard] = token
        return token

    def holder(self, shard: str) -> Owner | None:
        """The run that has a shard, if any."""
        return read_owner(self._folder, str(_claim(self._folder, shard).get("run")))

    def release(self, shard: str) -> None:
        """Release a shard, done or not; does nothing if another run has taken it over."""
        token = self._tokens.pop(shard, None)
        if token is not None:
            self._place.release({shard: token})

    def close(self) -> None:
        """Release everything and leave; safe to call twice. Claims that cannot be removed now end with the run."""
        if self._tokens:
            self._place.release(dict(self._tokens))
            self._tokens.clear()
        if self._own:
            self.presence.close()


class _Files:
    """Claims of a local folder. One whose guard is held at the moment of its release is released with a later one."""

    def __init__(self, folder: Folder, presence: Presence) -> None:
        self._folder, self._presence = folder, presence
        self._left: dict[str, str] = {}
        folder.private_folder(CLAIMS)

    def take(self, shard: str, token: str, data: bytes) -> bool:
        with guard(self._folder, PATIENCE):
            self._remove_left()
            path = self._folder.private_to_write(f"{CLAIMS}/{shard}.json")
            try:
                with create(path) as file:
                    file.write(data)
                return True
            except FileExistsError:
                claim = _claim(self._folder, shard)
            if lives(self._folder, read_owner(self._folder, str(claim.get("run")))):
                return False
            write_new(path, data)
            if claim:
                clear(self._folder.private_to_write(scratch_of(Claim(shard, claim["token"]))))
            return True

    def release(self, shards: dict[str, str]) -> None:
        self._left |= shards
        with contextlib.suppress(LockHeld), guard(self._folder, PATIENCE):
            self._remove_left()

    def _remove_left(self) -> None:
        while self._left:
            shard, token = self._left.popitem()
            if _claim(self._folder, shard).get("token") == token:
                self._folder.remove_file(_name(shard))


class _Objects:
    """Claims in a store. The claim of a dead run is replaced without a lock: of several runs that do so at once the
    last one has it, and should two work on the shard, the first to commit has committed."""

    def __init__(self, folder: Folder, presence: Presence) -> None:
        self._folder, self._presence = folder, presence

    def take(self, shard: str, token: str, data: bytes) -> bool:
        name = _name(shard)
        if self._folder.fs.create(data, self._folder.full(name)):
            return True
        claim = _claim(self._folder, shard)
        if claim.get("token") == token:  # the answer to our own creation was lost
            return True
        if lives(self._folder, read_owner(self._folder, str(claim.get("run"))), self._presence):
            return False
        self._folder.write(name, data)
        return _claim(self._folder, shard).get("token") == token

    def release(self, shards: dict[str, str]) -> None:
        for shard, token in shards.items():
            if _claim(self._folder, shard).get("token") == token:
                self._folder.remove_file(_name(shard))
