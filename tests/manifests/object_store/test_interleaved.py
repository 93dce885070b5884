"""Commits of several writers, step by step in random order, with kills: no reader ever sees another writer's bytes."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import CapipeError
from capipe.manifests.files.storage import Folder
from capipe.manifests.files.stores import Store
from capipe.manifests.manifest import Manifest, ShardRecord
from capipe.manifests.publishing import publish, retract

NAMES = ("00000.tar", "00000.parquet", "00000_stats.json")
STEPS = ("create", "put", "write", "copy", "remove", "read", "size", "open")  # of a store, each indivisible


Actions = Mapping[str, Callable[[], None]]


class Killed(BaseException):
    """kill -9."""


class Turns:
    """Lets one of several threads take one step at a time, in an order of the test's choice."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.waiting: set[str] = set()
        self.chosen = ""
        self.over: set[str] = set()
        self.dead: set[str] = set()

    def step(self) -> None:
        name = threading.current_thread().name
        with self.turn:
            self.waiting.add(name)
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.chosen == name)
            self.waiting.remove(name)
            self.chosen = ""
        if name in self.dead:
            raise Killed

    def run(self, actions: Actions, choose: Callable[[list[str]], str], look: Callable[[], None]) -> None:
        """Run all actions to their ends, one step after the other; ``look`` is called between any two."""
        for name, action in actions.items():
            threading.Thread(target=self._run, args=(name, action), name=name, daemon=True).start()
        with self.turn:
            while len(self.over) < len(actions):
                assert self.turn.wait_for(
                    lambda: not self.chosen and len(self.waiting) + len(self.over) == len(actions), 30
                )
                if self.waiting:
                    look()
                    self.chosen = choose(sorted(self.waiting))
                    self.turn.notify_all()

    def _run(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Killed:
            pass
        finally:
            with self.turn:
                self.over.add(name)
                self.turn.notify_all()


def stepping(folder: Folder, turns: Turns) -> Folder:
    """The folder, with a pause before each step."""
    store = folder.fs

    class Stepping(Store):
        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if name not in STEPS:
                return value

            def step(*arguments: Any, **named: Any) -> Any:
                turns.step()
                return getattr(store, name)(*arguments, **named)

            return step

    folder.fs = Stepping(store._fs)
    folder.__dict__["is_conditional"] = True
    return folder


class Writer:
    """A run with its own version of shard 00000."""

    def __init__(self, url: str, place: Path, name: str, version: str = "") -> None:
        self.url, self.place, self.version = url, place / url.rpartition("/")[2] / name, version or name
        self.result: ShardRecord | None = None
        self.place.mkdir(parents=True)

    def write(self, folder: Folder, over: ShardRecord | None = None) -> ShardRecord:
        files = {}
        for name in NAMES:  # the smallest file is the same in all versions
            self.place.joinpath(name).write_bytes(f"{'' if 'stats' in name else self.version} {name}".encode())
            files[name] = self.place / name
        digests = {n: {"bytes": p.stat().st_size, "sha256": sha(p.read_bytes())} for n, p in files.items()}
        record = ShardRecord("00000", {"ok": 1}, digests, {"digest": "d"}, "f")
        return publish(folder, "", files, record, 0.0, over)

    def act(self, turns: Turns) -> None:
        self.result = self.write(stepping(Folder(self.url), turns))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sound(url: str) -> ShardRecord | None:
    """What a reader sees: nothing, or a shard whose files are those of its record."""
    record = Manifest(Folder(url)).committed().get("00000")
    if record is not None:
        assert {name: sha(Folder(url).read_bytes(name)) for name in NAMES} == {
            name: file["sha256"] for name, file in record.files.items()
        }
    return record


@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_steps_and_no_kill_mixes_two_versions(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(25):
        url = f"memory://interleaved-{tmp_path.name}-{number}"
        turns, versions = Turns(), rng.choice([("a", "b"), ("a", "b", "c"), ("a", "a2", "b")])
        writers = {name: Writer(url, tmp_path, name, name[0]) for name in versions}
        kills = {rng.choice(versions): rng.randrange(1, 14) for _ in range(rng.randrange(3))}
        taken: dict[str, int] = dict.fromkeys(versions, 0)

        def choose(ready: list[str], taken: Any = taken, kills: Any = kills, turns: Any = turns) -> str:
            chosen = rng.choice(ready)
            taken[chosen] += 1
            if taken[chosen] == kills.get(chosen):
                turns.dead.add(chosen)
            return chosen

        seen: list[ShardRecord] = []

        def look(url: str = url, seen: Any = seen) -> None:
            record = sound(url)
            if seen:
                assert record == seen[0]  # once committed, never another
            elif record is not None:
                seen.append(record)

        turns.run({name: (lambda w=writer, t=turns: w.act(t)) for name, writer in writers.items()}, choose, look)
        Manifest(Folder(url)).finish()  # as the next run does
        last = Writer(url, tmp_path, "z").write(Folder(url))
        assert last == sound(url) and (not seen or last == seen[0])
        ended = [writer.result for name, writer in writers.items() if name not in turns.dead]
        assert all(result == last for result in ended), "who came to an end was told what stands"
        assert not seen or last.files["00000.tar"]["sha256"] != sha(b"z 00000.tar")


def test_a_late_writer_meets_a_shard_that_was_taken_back_and_done_again(tmp_path: Path) -> None:
    """It was stopped before its first upload, and goes on after two other versions: the newest stands."""
    url = f"memory://late-{tmp_path.name}"
    turns = Turns()
    late = Writer(url, tmp_path, "late")

    def others() -> None:
        first = Writer(url, tmp_path, "first").write(Folder(url))
        retract(Folder(url), "", first)
        assert sound(url) is None
        second = Writer(url, tmp_path, "second").write(Folder(url))
        assert sound(url) == second and second.replaces == first.current

    others()
    turns.run({"late": lambda: late.act(turns)}, lambda ready: ready[0], lambda: None)
    assert late.result == sound(url) and late.result is not None
    assert late.result.files["00000.tar"]["sha256"] == sha(b"second 00000.tar")
    assert [name for name in Folder(url).fs.find(Folder(url).path) if "attempts" in name] == []


def test_a_version_that_is_not_the_newest_is_neither_taken_back_nor_replaced(tmp_path: Path) -> None:
    url = f"memory://twice-{tmp_path.name}"
    first = Writer(url, tmp_path, "first").write(Folder(url))
    retract(Folder(url), "", first)
    second = Writer(url, tmp_path, "second").write(Folder(url))
    with pytest.raises(CapipeError, match="replaced by another run"):
        retract(Folder(url), "", first)
    third = Writer(url, tmp_path, "third")
    with pytest.raises(CapipeError, match="replaced by another run"):
        third.write(Folder(url), over=first)
    assert sound(url) == second
    assert third.write(Folder(url), over=second) == sound(url)
