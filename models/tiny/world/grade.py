"""Grading of captions against the scene graph: stated attributes, precision and recall.

Parses all wordings of :mod:`.captions`; of any other text, only what it recognises, usually nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

from .captions import NUMBERS
from .scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene

KINDS = ("shape", "color", "size", "place", "background", "count", "sign", "sign_place")
SYNONYMS = {"big": "large", "little": "small", "grey": "gray"}
DENSE_FROM = 6  # stated attributes; short captions state at most five, dense ones at least six

_SIZE, _COLOR, _SHAPE = "|".join((*SIZES, "big", "little")), "|".join(COLORS), "|".join(SHAPES)
_BACKGROUND = "|".join((*BACKGROUNDS, "grey"))
_PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_MENTION = re.compile(
    rf"\b(?:(?:(?P<size>{_SIZE}) )?(?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE})(?:e?s)?"
    rf"|(?P<sign>signs?)|(?:in|at) the (?P<place>{_PLACE}))\b"
)
_SCENERY = re.compile(rf"\b(?:(?P<before>{_BACKGROUND}) background|background is (?P<after>{_BACKGROUND}))\b")
_COUNT = re.compile(rf"\b(?P<count>{'|'.join(NUMBERS[1:])}) (?:shape|object)s?\b")
_QUOTED = re.compile(r'"([^"]*)"')
_SENTENCE = re.compile(r"[.!?\n]+")


@dataclass(frozen=True)
class ThingClaim:
    """A thing as stated in a caption; None for attributes that it does not state."""

    shape: str
    color: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class SignClaim:
    """A sign as stated in a caption."""

    text: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Facts:
    """All statements recognised in a caption, in order, repetitions included."""

    things: tuple[ThingClaim, ...] = ()
    signs: tuple[SignClaim, ...] = ()
    backgrounds: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grade:
    """Counts by kind of attribute; the sum of grades gives precision and recall over many scenes.

    ``stated`` attributes, of which ``correct`` are true; ``expected`` true ones, of which ``recalled`` were stated.
    ``hallucinated``: things and signs that match nothing in the scene.
    """

    stated: Counter[str] = field(default_factory=Counter)
    correct: Counter[str] = field(default_factory=Counter)
    expected: Counter[str] = field(default_factory=Counter)
    recalled: Counter[str] = field(default_factory=Counter)
    hallucinated: int = 0

    def __add__(self, other: Grade) -> Grade:
        return Grade(*(getattr(self, counts.name) + getattr(other, counts.name) for counts in fields(self)))

    def precision(self, kind: str | None = None) -> float:
        """The share of stated attributes (of ``kind``, or all) that are true; 1 if none is stated."""
        return _share(self.correct, self.stated, kind)

    def recall(self, kind: str | None = None) -> float:
        """The share of true attributes (of ``kind``, or all) that were stated; 1 if there are none."""
        return _share(self.recalled, self.expected, kind)

    @property
    def exact(self) -> bool:
        """Whether every attribute is stated and none is false."""
        return self.correct == self.stated and self.recalled == self.expected and not self.hallucinated

    @property
    def dense(self) -> bool:
        """For one caption's grade: whether it states more than any short caption does."""
        return self.stated.total() >= DENSE_FROM


def total(grades: Iterable[Grade]) -> Grade:
    """The sum of grades."""
    return sum(grades, Grade())


def parse(caption: str) -> Facts:
    """Parse the statements of a caption; an empty ``Facts`` for unrecognised text."""
    things: list[ThingClaim] = []
    signs: list[SignClaim] = []
    plain = " ".join(caption.lower().split())
    for sentence in _SENTENCE.split(" ".join(caption.split())):
        for claim in _claims(sentence):
            if isinstance(claim, ThingClaim):
                things.append(claim)
            else:
                signs.append(claim)
    backgrounds = tuple(_canonical(m["before"] or m["after"]) for m in _SCENERY.finditer(plain))
    counts = tuple(NUMBERS.index(m["count"]) for m in _COUNT.finditer(plain))
    return Facts(tuple(things), tuple(signs), backgrounds, counts)


def grade(scene: Scene, caption: str) -> Grade:
    """Compare the statements of ``caption`` with ``scene``. A repeated statement counts as recalled once."""
    facts = parse(caption)
    result = Grade(expected=_expected(scene))
    hallucinated = 0
    for claim, index in zip(facts.things, match(facts.things, scene), strict=True):
        thing = scene.things[index] if index is not None else None
        hallucinated += thing is None
        for kind in ("shape", "color", "size", "place"):
            _count(result, kind, getattr(claim, kind), getattr(thing, kind, None))
    for number, sign in enumerate(facts.signs):
        truth = scene.sign if number == 0 else None
        hallucinated += truth is None
        _count(result, "sign", sign.text, truth.text if truth else None)
        _count(result, "sign_place", sign.place, truth.place if truth else None)
    for number, background in enumerate(facts.backgrounds):
        _count(result, "background", background, scene.background, again=number > 0)
    for number, count in enumerate(facts.counts):
        _count(result, "count", count, len(scene.things), again=number > 0)
    return Grade(result.stated, result.correct, result.expected, result.recalled, hallucinated)


def is_true(scene: Scene, sentence: str) -> bool | None:
    """Whether everything that one sentence states of ``scene`` is true; None for a sentence that states nothing known.

    A thing or a sign that is merely named is a statement, too: it is there, or it is not.
    """
    if parse(sentence) == Facts():
        return None
    result = grade(scene, sentence)
    return result.correct == result.stated and not result.hallucinated


def match(claims: tuple[ThingClaim, ...], scene: Scene) -> list[int | None]:
    """Match each claim to the index of a thing of the scene, each thing once: by place first, then by similarity.

    A claim that shares no attribute with any remaining thing gets None.
    """
    chosen: list[int | None] = [None] * len(claims)
    left = {thing.place: index for index, thing in enumerate(scene.things)}
    for number, claim in enumerate(claims):
        if claim.place in left:
            chosen[number] = left.pop(claim.place)
    open_claims = [number for number, index in enumerate(chosen) if index is None]
    likeness = {
        (number, index): sum(getattr(claims[number], kind) == getattr(scene.things[index], kind) for kind in KINDS[:3])
        for number in open_claims
        for index in left.values()
    }
    for (number, index), alike in sorted(likeness.items(), key=lambda item: (-item[1], item[0])):
        if alike and chosen[number] is None and index not in chosen:
            chosen[number] = index
    return chosen


def _claims(sentence: str) -> Iterator[ThingClaim | SignClaim]:
    """The things and signs of one sentence with their places, which all precede or all follow them."""
    quoted = _QUOTED.search(sentence)
    text = quoted[1] if quoted else None
    mentions = list(_MENTION.finditer(_QUOTED.sub("", sentence).lower()))
    if mentions and mentions[0]["place"]:
        mentions.reverse()  # either way, a place then follows its thing or sign
        yield from reversed(list(_placed(mentions, text)))
    else:
        yield from _placed(mentions, text)


def _placed(mentions: list[re.Match[str]], text: str | None) -> Iterator[ThingClaim | SignClaim]:
    """Claims from mentions in which a place belongs to the thing or sign right before it."""
    following = [*mentions, None][1:]
    for mention, after in zip(mentions, following, strict=True):
        place = after["place"] if after else None
        if mention["sign"]:
            yield SignClaim(text, place)
        elif mention["shape"]:
            size = mention["size"]
            yield ThingClaim(mention["shape"], mention["color"], _canonical(size) if size else None, place)


def _canonical(word: str) -> str:
    return SYNONYMS.get(word, word)


def _expected(scene: Scene) -> Counter[str]:
    expected = Counter({kind: len(scene.things) for kind in ("shape", "color", "size", "place")})
    expected.update(("background", "count"))
    if scene.sign is not None:
        expected.update(("sign", "sign_place"))
    return expected


def _count(result: Grade, kind: str, stated: object, truth: object, again: bool = False) -> None:
    """Add one statement (None: nothing stated) to the counts of ``result``; ``again``: it is a repetition."""
    if stated is None:
        return
    result.stated[kind] += 1
    if stated == truth:
        result.correct[kind] += 1
        if not again:
            result.recalled[kind] += 1


def _share(part: Counter[str], whole: Counter[str], kind: str | None) -> float:
    if kind is not None:
        return part[kind] / whole[kind] if whole[kind] else 1.0
    return part.total() / whole.total() if whole.total() else 1.0
