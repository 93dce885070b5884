"""Commit of a shard in a store without locks: nobody can overwrite the bytes of a committed shard, however late.

1. Each file is created under its plain name, conditionally: the first complete upload of a name wins. If there is an
   object with the same bytes (the same command writes the same), it serves. If there are other bytes, of an attempt
   that may be dead or only slow, the file goes to ``_capipe/attempts/<attempt>/`` instead.
2. The commit is the conditional creation of the shard's next entry in the :mod:`.log`, which names the files that are
   not in their place. One of several writers creates it; the others find it, and drop what they have aside.
3. Files aside are copied over the plain names, and the entry is written again without them: only then do readers heed
   it. Whoever finds an entry with files aside (the next run, if this one died) does the same, with the same result:
   their bytes are those of the one entry, and late writers can only create what does not exist.

Plain names of shards that are not committed are never removed, except by `--fresh` and for retracted shards: a slow
attempt may be about to name them. No step asks a clock, or whether another process is alive.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ArtifactMismatch
from ..files import bounded_json
from ..files.storage import Folder, scratch_name
from .log import ATTEMPTS, Entry, Log, Note, last

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Upload:
    """A finished local file of a shard, with its size and sha256."""

    path: Path
    bytes: int
    sha256: str


def commit(
    folder: Folder, shard: str, files: Mapping[str, Upload], note: Note, line: Callable[[Entry | None], bytes]
) -> Entry:
    """Upload a shard's files and commit them; returns the entry that stands: ours, or that of an earlier writer.

    ``line``: the record, given the entry that it follows (a retraction, or one of an older generation). Interrupted at
    any point, it may be repeated from the start.
    """
    attempt = uuid.uuid4().hex
    before = last(folder, shard) if not folder.is_conditional else None
    aside = {name: place for name, file in files.items() if (place := _upload(folder, name, file, attempt)) is not None}
    entry = _decide(folder, shard, replace(note, attempt=attempt, objects=aside), line, before)
    return _finished(folder, entry, attempt, files, aside)


def retract(
    folder: Folder, shard: str, note: Note, line: Callable[[Entry | None], bytes], before: Entry | None
) -> Entry:
    """Take a committed shard back. ``before``: its entry. Returns the entry that follows it: a retraction, ours or not,
    or a newer version."""
    return _decide(folder, shard, replace(note, attempt=uuid.uuid4().hex), line, before)


def replace_committed(
    folder: Folder, shard: str, files: Mapping[str, Upload], note: Note, line: bytes, before: Entry
) -> Entry:
    """Commit a new version over a committed one, whose entry is ``before``."""
    attempt = uuid.uuid4().hex
    aside = {}
    for name, file in files.items():
        if not _same(folder, name, file):
            aside[name] = _put_aside(folder, name, file, attempt)
    entry = _decide(folder, shard, replace(note, attempt=attempt, objects=aside), lambda _: line, before)
    return _finished(folder, entry, attempt, files, aside)


def _finished(
    folder: Folder, entry: Entry, attempt: str, files: Mapping[str, Upload], aside: Mapping[str, str]
) -> Entry:
    """Finish the commit that stands, ours or not. Ours may lack the files aside, if the attempt was taken for dead."""
    if entry.note.attempt != attempt and aside:
        folder.remove(f"{ATTEMPTS}/{attempt}")
    if not entry.note.objects:
        return entry
    try:
        return finish(folder, entry)
    except FileNotFoundError:
        if entry.note.attempt != attempt:
            raise
    for name, place in aside.items():
        folder.fs.put(str(files[name].path), folder.full(place))
    return finish(folder, entry)


def finish(folder: Folder, entry: Entry) -> Entry:
    """Bring the files of a commit to their names; may be interrupted, repeated, and done by several at once."""
    try:
        for name, place in entry.note.objects.items():
            folder.fs.copy(folder.full(place), folder.full(name))
    except FileNotFoundError:
        standing = last(folder, entry.shard)
        if standing is None or (standing.number == entry.number and standing.note.objects):
            raise
        return standing  # another run has finished it
    whole = replace(entry, note=replace(entry.note, objects={}))
    folder.write(entry.name, whole.data)
    folder.remove(f"{ATTEMPTS}/{entry.note.attempt}")
    return whole


def finish_all(folder: Folder, entries: Sequence[Entry], generation: str) -> None:
    """Complete commits that a crash interrupted, of those that count."""
    newest = {entry.shard: entry for entry in entries if entry.note.generation == generation}
    for entry in newest.values():
        if entry.note.objects:
            finish(folder, entry)


@dataclass(frozen=True)
class Leftovers:
    """What unfinished commits have left by now: ``attempts`` with files aside, and ``uploads`` (path and id)."""

    attempts: tuple[str, ...]
    uploads: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, folder: Folder) -> Leftovers:
        """Those in a store at this moment."""
        return cls(tuple(folder.names(ATTEMPTS)), tuple(folder.fs.unfinished_uploads(folder.path)))

    def remove(self, folder: Folder) -> None:
        """Remove them, except for the files of an entry, whose commit is still to be finished. The runs that made them
        must have ended."""
        for path, upload in self.uploads:
            folder.fs.abort_upload(path, upload)
        if not self.attempts:
            return
        try:
            named = {entry.note.attempt for entry in Log(folder).read() if entry.note.objects}
        except ArtifactMismatch:  # of a damaged manifest, which its readers report; then all are kept
            return
        for attempt in self.attempts:
            if attempt not in named:
                folder.remove(f"{ATTEMPTS}/{attempt}")


def _decide(
    folder: Folder, shard: str, note: Note, line: Callable[[Entry | None], bytes], before: Entry | None
) -> Entry:
    """Create the shard's next entry, unless it is committed by now."""
    while True:
        entry = Entry(shard, 0 if before is None else before.number + 1, line(before), note)
        if folder.fs.create(entry.data, folder.full(entry.name)):
            return entry
        standing = last(folder, shard)
        if standing is None or (standing.number < entry.number):
            continue  # removed meanwhile
        if standing.note.attempt == note.attempt or not is_superseded(standing, note.generation):
            return standing
        before = standing


def is_superseded(entry: Entry, generation: str) -> bool:
    """True if another entry may follow without replacing anything: it is a retraction, or of an older generation."""
    return entry.note.generation != generation or is_retraction(entry)


def is_retraction(entry: Entry) -> bool:
    """Raises ValueError if the entry's record is malformed."""
    record = bounded_json.parse(entry.line)
    return isinstance(record, dict) and bool(record.get("retracted"))


def _upload(folder: Folder, name: str, file: Upload, attempt: str) -> str | None:
    """Bring a file to its plain name, or aside; returns where aside."""
    if not folder.is_conditional:
        folder.fs.put(str(file.path), folder.full(name))
        return None
    while not folder.fs.create(str(file.path), folder.full(name)):
        same = _same(folder, name, file)
        if same is not None:
            return None if same else _put_aside(folder, name, file, attempt)
    return None


def _put_aside(folder: Folder, name: str, file: Upload, attempt: str) -> str:
    place = f"{ATTEMPTS}/{attempt}/{scratch_name(name)}"
    folder.fs.put(str(file.path), folder.full(place))
    return place


def _same(folder: Folder, name: str, file: Upload) -> bool | None:
    """True if the object of this name has the file's bytes; None if there is none."""
    try:
        if folder.size(name) != file.bytes:
            return False
        digest = hashlib.sha256()
        with folder.open(name) as stream:
            while data := stream.read(_CHUNK):
                digest.update(data)
    except FileNotFoundError:
        return None
    return digest.hexdigest() == file.sha256
