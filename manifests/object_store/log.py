"""The manifest of an artifact in a store: one object for each commit and retraction of a shard, created conditionally.

``_capipe/manifest.d/00000.json`` is the first entry about shard 00000, ``00000.json.1`` the next; the last one counts,
and none is ever replaced by another decision. An entry has two lines: the record, as in a local manifest, and a note
(:class:`Note`) with what is not part of it: whose it is, and its times.

Entries are listed in one go. Those read before are not read again: in memory, and across runs by the digest ``_capipe/
manifest.d.jsonl``, a copy of many entries in one object, each used only while the store lists its entry's ETag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ...errors import ArtifactMismatch
from ..files import bounded_json
from ..files.names import checked_name
from ..files.storage import PRIVATE, Folder

OBJECTS = f"{PRIVATE}/manifest.d"
COPY = f"{PRIVATE}/manifest.d.jsonl"
MANY = 64  # entries to read one by one: more are worth a look into the copy, or a new one
ATTEMPTS = f"{PRIVATE}/attempts"  # files of commits that are not yet at their names, a folder for each attempt
_ATTEMPT = re.compile(r"[0-9a-f]{32}")
_NEXT = re.compile(r"(.+\.json)\.([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Note:
    """``attempt``: a random id; ``generation``: of the artifact, changed by each `--fresh`. ``objects``: files of the
    shard that are not yet at their names, and where they are; with any, readers ignore the entry. Times as in
    :mod:`..times`."""

    attempt: str = ""
    generation: str = ""
    objects: Mapping[str, str] = field(default_factory=dict)
    started: float = 0.0
    ended: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    gpus: int = 0
    cores: int = 0


@dataclass(frozen=True)
class Entry:
    """``name``: of its object; ``number``: 0 for the first about its shard; ``line``: the record, without a newline."""

    shard: str
    number: int
    line: bytes
    note: Note

    @property
    def name(self) -> str:
        return f"{OBJECTS}/{_object(self.shard, self.number)}"

    @property
    def data(self) -> bytes:
        facts = {key: value for key, value in asdict(self.note).items() if value}
        return self.line + b"\n" + json.dumps(facts, sort_keys=True).encode() + b"\n"


class Log:
    """The entries, as last read. Not thread-safe."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._known: dict[str, tuple[str, Entry]] = {}  # ETag and entry by object name
        self._uncopied = 0
        self.entries: list[Entry] = []

    def read(self) -> list[Entry]:
        """All entries, sorted by shard and number: one listing, and those that are new. Raises ArtifactMismatch,
        OSError."""
        marks = self._folder.marks(OBJECTS)
        new = self._missing(marks)
        if len(new) > MANY and not self._known:
            self._known = self._copied()
            new = self._missing(marks)
        if new or self._known.keys() != marks.keys():
            paths = {self._folder.full(f"{OBJECTS}/{name}"): name for name in new}
            read = self._folder.fs.read_all(paths)
            self._known = {name: known for name, known in self._known.items() if name in marks and name not in new}
            for path, data in read.items():
                name = paths[path]
                self._known[name] = marks[name], parse(self._folder, name, data)
            self._uncopied += len(read)
            entries = (entry for _, entry in self._known.values())
            self.entries = sorted(entries, key=lambda entry: (entry.shard, entry.number))
        return self.entries

    def _missing(self, marks: Mapping[str, str]) -> set[str]:
        """Entries not read yet, or replaced since; without ETags all of them."""
        known = self._known
        return {name for name, mark in marks.items() if name not in known or known[name][0] != mark or not mark}

    def _copied(self) -> dict[str, tuple[str, Entry]]:
        """Entries of the copy; one that cannot be read is as good as none."""
        copied = {}
        try:
            for line in self._folder.read_bytes(COPY).splitlines():
                facts = bounded_json.parse(line)
                name = str(facts["name"])
                copied[name] = str(facts["mark"]), parse(self._folder, name, str(facts["data"]).encode())
        except (OSError, ValueError, KeyError, TypeError, ArtifactMismatch):
            return {}
        return copied

    def copy(self) -> None:
        """Write the copy anew if many entries are not in it. Another writer's may replace it: either is correct."""
        if self._uncopied <= MANY:
            return
        lines = [
            json.dumps({"name": name, "mark": mark, "data": entry.data.decode()}, sort_keys=True).encode() + b"\n"
            for name, (mark, entry) in sorted(self._known.items())
            if mark
        ]
        self._folder.write(COPY, b"".join(lines))
        self._uncopied = 0


def last(folder: Folder, shard: str) -> Entry | None:
    """The last entry about a shard, without a listing."""
    found: Entry | None = None
    while True:
        name = _object(shard, 0 if found is None else found.number + 1)
        try:
            data = folder.read_bytes(f"{OBJECTS}/{name}")
        except FileNotFoundError:
            return found
        found = parse(folder, name, data)


def parse(folder: Folder, name: str, data: bytes) -> Entry:
    """An entry from its object. Raises ArtifactMismatch."""
    line, _, rest = data.partition(b"\n")
    try:
        shard, number = _place(name)
        note = Note(**bounded_json.parse(rest)) if rest.strip() else Note()  # older ones have no note
        _check(note)
        return Entry(shard, number, line, note)
    except (ValueError, TypeError) as error:
        text = f"{folder.url}/{OBJECTS}/{name}: not an entry of a manifest ({error}); was it edited? Restore it"
        raise ArtifactMismatch(f"{text}, or clear the folder") from None


def _check(note: Note) -> None:
    """Raise ValueError or TypeError if a note is malformed: its names are copied to and from, its id is a folder's."""
    texts = (note.generation, note.attempt, note.worker)
    if not (isinstance(note.objects, dict) and all(isinstance(text, str) for text in texts)):
        raise TypeError("its objects, generation, attempt or worker are of another type")
    if not (_ATTEMPT.fullmatch(note.attempt) or (note.attempt == "" and not note.objects)):
        raise ValueError("its attempt is no id")
    numbers = (note.started, note.ended, note.seconds, note.gpus, note.cores)
    if not all(type(value) in (int, float) for value in numbers):
        raise TypeError("its times are no numbers")
    for name, place in note.objects.items():
        checked_name(name)
        if not checked_name(place).startswith(f"{ATTEMPTS}/{note.attempt}/"):
            raise ValueError(f"{name} is said to be outside {ATTEMPTS}")


def _object(shard: str, number: int) -> str:
    return f"{shard}.json.{number}" if number else f"{shard}.json"


def _place(name: str) -> tuple[str, int]:
    if name.endswith(".json"):
        return name.removesuffix(".json"), 0
    later = _NEXT.fullmatch(name)
    if later is None:
        raise ValueError("its name is no shard's")
    return later[1].removesuffix(".json"), int(later[2])


def is_whole(entry: Entry, generation: str) -> bool:
    """True if readers heed the entry: it is of this generation of the artifact, and its files are at their names."""
    return entry.note.generation == generation and not entry.note.objects
