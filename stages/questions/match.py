"""Matching of question-set records to images by uid, key or file name; ambiguous names are refused."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ...manifests.files.tar import printable
from ...manifests.samples import split_name
from .import_sets import QuestionRecord
from .open_ended import OpenQuestion, open_question
from .validate import RawQuestion, checked

_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class ImageNames:
    """Names of an image in the shards. ``source``: the file it was ingested from, None in foreign tars."""

    key: str
    source: str | None = None
    uid: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The set's questions about an image, as dicts of QUESTION_FIELDS in the set's order.

    ``raw``: their records, one per line. ``error``: why other records that name the image were refused. ``open_ended``:
    those without options, if the index keeps them; each once.
    """

    questions: list[dict[str, Any]]
    raw: str
    error: str | None = None
    open_ended: tuple[OpenQuestion, ...] = ()


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A record without a matching image. ``image``: the most specific name that it gives."""

    where: str
    image: str
    reason: str


class _Level(IntEnum):
    """Specificity of a match between record and image."""

    SHARED = 0  # by file name alone, and the set has other files of this name
    NAME = 1  # by file name alone: the folders differ
    PATH = 2  # one path is a suffix of the other
    KEY = 3
    UID = 4


class QuestionIndex:
    """Index of a whole set in memory, joined with the names of all images that will be looked up.

    Both sides are needed to detect names that match several images; such records are refused. Each record goes to the
    images with its most specific match, and to no others. Images with the same uid are one image.
    Memory: 1 to 2 KB per question.
    """

    def __init__(
        self, records: Iterable[QuestionRecord], images: Iterable[ImageNames], open_ended: bool = False
    ) -> None:
        """``images``: each once; a uid that is not known yet may be missing: look-ups still use it.

        ``open_ended``: questions without options are kept apart, instead of being refused.
        """
        self._open_ended = open_ended
        self._records = list(records)
        self._by_name: dict[str, list[int]] = defaultdict(list)
        self._by_file: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, record in enumerate(self._records):
            for name in record.images:
                path = _path(name)
                self._by_name[_composed(name)].append(number)
                for file in {posixpath.basename(path), _stem(path)}:  # foreign tars have only the stem
                    self._by_file[file][path].append(number)
        self._best: dict[int, _Level] = {}
        self._claims: dict[int, set[str]] = defaultdict(set)  # by record: the images with its most specific match
        self._given: set[int] = set()
        for position, image in enumerate(images):
            for number, level in self._candidates(image).items():
                self._claim(number, level, image.uid or str(position))

    def lookup(self, uid: str | None, key: str, source: str | None = None) -> Found | None:
        """The set's questions about an image, checked and deduplicated; None if no record names it."""
        candidates = self._candidates(ImageNames(key, source, uid))
        numbers = sorted(n for n, level in candidates.items() if level >= self._best.get(n, level))
        if not numbers:
            return None
        doubts = {n: None if candidates[n] is _Level.UID else self._doubt(n) for n in numbers}
        taken = [n for n in numbers if doubts[n] is None]
        self._given.update(taken)
        seen: set[str] = set()
        entries, opened = self._divided(taken)
        questions = [checked(entry, seen) for entry in entries]
        notes = [f"{self._records[n].where} not taken: {doubt}" for n, doubt in doubts.items() if doubt is not None]
        raw = "\n".join(self._records[n].raw for n in taken)
        return Found(questions, raw, notes[0] if notes else None, opened)

    def _divided(self, numbers: Iterable[int]) -> tuple[list[RawQuestion], tuple[OpenQuestion, ...]]:
        """The questions of these records, and apart from them the open-ended ones, if these are kept."""
        entries: list[RawQuestion] = []
        opened: dict[str, OpenQuestion] = {}
        for entry in (entry for number in numbers for entry in self._records[number].questions):
            question = open_question(entry) if self._open_ended else None
            if question is None:
                entries.append(entry)
            else:
                opened.setdefault(question.id, question)
        return entries, tuple(opened.values())

    def unmatched(self) -> list[Unmatched]:
        """Records without a matching image, in the set's order, each with its reason."""
        return [
            Unmatched(record.where, record.images[0] if record.images else "", reason)
            for number, record in enumerate(self._records)
            if number not in self._given and (reason := self._doubt(number)) is not None
        ]

    def _claim(self, number: int, level: _Level, image: str) -> None:
        best = self._best.get(number, level)
        if level > best:
            self._claims[number].clear()
        if level >= best:
            self._best[number] = level
            self._claims[number].add(image)

    def _candidates(self, image: ImageNames) -> dict[int, _Level]:
        """Records that may be about an image, each with its most specific match."""
        levels: dict[int, _Level] = {}
        for number, level in self._named(image):
            levels[number] = max(level, levels.get(number, level))
        return levels

    def _named(self, image: ImageNames) -> Iterator[tuple[int, _Level]]:
        if image.uid is not None and _UID.fullmatch(image.uid):
            yield from ((number, _Level.UID) for number in self._by_name.get(image.uid, ()))
        yield from ((number, _Level.KEY) for number in self._by_name.get(_composed(image.key), ()))
        ours = _path(image.source if image.source is not None else image.key)
        paths = self._by_file.get(posixpath.basename(ours), {})
        for theirs, numbers in paths.items():
            stem = theirs if image.source is not None else posixpath.join(posixpath.dirname(theirs), _stem(theirs))
            alone = _Level.NAME if len(paths) == 1 else _Level.SHARED
            level = _Level.PATH if _ends_in(ours, stem) or _ends_in(stem, ours) else alone
            yield from ((number, level) for number in numbers)

    def _doubt(self, number: int) -> str | None:
        """Reason why a record matches no image; None if it matches one."""
        record = self._records[number]
        if not record.images:
            fault = record.questions[0].fault if record.questions else None
            return fault[1] if fault else "it names no image, or several"
        if number not in self._best:
            return "no image of the shards has this name"
        if self._best[number] is _Level.SHARED:
            return "the set has several files of this name, and the folders are not those of the shards' images"
        if len(self._claims[number]) > 1:
            return f"{len(self._claims[number])} images have this name; name them by uid, key or longer paths"
        return None


def _path(name: str) -> str:
    """A name normalised as a path; made printable, because ``source`` is."""
    return _composed(posixpath.normpath(printable(name).replace("\\", "/")))


def _composed(name: str) -> str:
    """NFC form: macOS decomposes accents in file names, most sets do not."""
    return unicodedata.normalize("NFC", name)


def _stem(path: str) -> str:
    return posixpath.basename(split_name(path)[0])


def _ends_in(path: str, end: str) -> bool:
    return f"/{path.lstrip('/')}".endswith(f"/{end.lstrip('/')}")
