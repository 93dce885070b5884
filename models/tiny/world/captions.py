"""Reference captions of a scene: short alt texts with few attributes, dense captions with every fact, and narrow ones.

A dense caption samples its style (synonyms, clause order) once and keeps it throughout.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

from .scenes import Scene, Sign, Thing

Layout = Literal["list", "sentences", "places"]
Clause = Literal["intro", "count", "background", "things", "sign"]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
ORDERS: tuple[tuple[Clause, ...], ...] = (
    ("intro", "things", "sign"),
    ("intro", "sign", "things"),
    ("count", "things", "sign", "background"),
    ("background", "count", "things", "sign"),
    ("count", "background", "things", "sign"),
)
NARROW_PAIRS = 0.25  # share of narrow captions with two facts; the others have one
NARROW_SIZES, NARROW_PLACES = 0.35, 0.6  # share of their things with a size, with a place
NARROW_SCENERY = 0.5  # weight of the background, and of the count, in the choice of a fact; a thing has 1


class Fact(NamedTuple):
    """One fact of a scene: ``kind`` as in :mod:`.grade`, of the shape at ``place`` ("" for the scene and its sign).

    The kind ``thing`` is a shape with all its attributes, ``plate`` a sign with its word and place.
    """

    kind: str
    place: str = ""


@dataclass(frozen=True)
class Style:
    """Wording choices, constant within a caption."""

    large: str
    small: str
    noun: str
    preposition: str
    corner: bool
    layout: Layout
    order: tuple[Clause, ...]
    opening: int
    verb: str


PLAIN = Style("large", "small", "shape", "in", False, "list", ORDERS[0], 1, "reads")  # for a reader's first lessons


def sample_style(rng: Random) -> Style:
    """A random style; common choices are sampled more often than rare ones, so that one wording is the most likely."""
    return Style(
        large=_mostly(rng, "large", "big"),
        small=_mostly(rng, "small", "little"),
        noun=_mostly(rng, "shape", "object"),
        preposition=_mostly(rng, "in", "at"),
        corner=rng.random() < 0.2,
        layout=rng.choices(("list", "sentences", "places"), (5, 3, 2))[0],
        order=rng.choices(ORDERS, (6, 1, 3, 2, 2))[0],
        opening=rng.randrange(3),
        verb=_mostly(rng, "reads", "says"),
    )


def dense_caption(scene: Scene, rng: Random, omitted: Container[Fact] = (), style: Style | None = None) -> str:
    """A caption with every fact: count, background, each thing with all its attributes, the sign and its word.

    Facts in ``omitted`` are left out; with no clause left, the caption is empty. ``style``: random by default.
    """
    style = style or sample_style(rng)
    clauses = [_clause(kind, scene, style, omitted) for kind in style.order]
    return " ".join(clause for clause in clauses if clause)


def short_caption(scene: Scene, rng: Random) -> str:
    """One sentence in the style of alt texts: one or two things with few attributes, never a size or a sign's word."""
    named = rng.sample(scene.things, min(len(scene.things), rng.choice((1, 1, 2))))
    phrases = [_with_article(f"{t.color} {t.shape}" if rng.random() < 0.6 else t.shape) for t in named]
    if scene.sign is not None and rng.random() < 0.3:
        phrases.append("a sign")
    text = _joined(phrases)
    if rng.random() < 0.2:
        text += f" on a {scene.background} background"
    opening = rng.choices(("", "There is ", "A picture of ", "This is "), (6, 2, 2, 1))[0]
    return _sentence(opening + text)


def narrow_caption(scene: Scene, rng: Random) -> str:
    """One fact in a sentence, or two in two: a thing, the background, or how many things there are. Never the sign.

    A thing has its colour and shape, seldom its size (:data:`NARROW_SIZES`), often its place (:data:`NARROW_PLACES`).
    """
    style = replace(sample_style(rng), layout="sentences", corner=False)
    facts = [_narrow_thing(scene, thing, style, rng) for thing in scene.things]
    facts += [_clause("background", scene, style, ()), _clause("count", scene, style, ())]
    weights = [1.0] * len(scene.things) + [NARROW_SCENERY] * 2
    chosen: list[str] = []
    for _ in range(2 if rng.random() < NARROW_PAIRS else 1):
        index = rng.choices(range(len(facts)), weights)[0]
        chosen.append(facts[index])
        weights[index] = 0.0
    return " ".join(chosen)


def _narrow_thing(scene: Scene, thing: Thing, style: Style, rng: Random) -> str:
    kept = {"size": rng.random() < NARROW_SIZES, "place": rng.random() < NARROW_PLACES}
    omitted = {Fact(kind, thing.place) for kind, told in kept.items() if not told}
    return _things(replace(scene, things=(thing,)), style, omitted)


def _mostly(rng: Random, common: str, rare: str) -> str:
    return common if rng.random() < 0.7 else rare


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _joined(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _counted(scene: Scene, style: Style, omitted: Container[Fact]) -> str:
    count = len(scene.things)
    nouns = f"{style.noun}{'s' if count > 1 else ''}"
    if Fact("count") not in omitted:
        return f"{NUMBERS[count]} {nouns}"
    return nouns if count > 1 else _with_article(nouns)


def thing_phrase(thing: Thing, style: Style, omitted: Container[Fact] = ()) -> str:
    """ "a large red star"; omitted attributes are left out, an omitted shape is replaced by the style's noun."""
    size = style.large if thing.size == "large" else style.small
    words = {"size": size, "color": thing.color, "shape": thing.shape}
    kept = [word for kind, word in words.items() if Fact(kind, thing.place) not in omitted]
    return _with_article(" ".join(kept if Fact("shape", thing.place) not in omitted else [*kept, style.noun]))


def where_phrase(place: str, style: Style) -> str:
    """ "in the top left corner", in the style's wording."""
    corner = " corner" if style.corner and place in CORNERS else ""
    return f"{style.preposition} the {place}{corner}"


def _clause(kind: Clause, scene: Scene, style: Style, omitted: Container[Fact]) -> str:
    """The sentences of one kind of clause; empty if the scene has no such fact or it is omitted."""
    scenery = "" if Fact("background") in omitted else f" on a {scene.background} background"
    match kind:
        case "intro":
            return _opening(scene, style, scenery, omitted)
        case "count":
            return "" if Fact("count") in omitted else _opening(scene, style, "", omitted)
        case "background":
            return f"The background is {scene.background}." if scenery else ""
        case "things":
            return _things(scene, style, omitted)
        case "sign":
            return _sign(scene.sign, style, omitted) if scene.sign and Fact("plate") not in omitted else ""


def _opening(scene: Scene, style: Style, tail: str, omitted: Container[Fact]) -> str:
    counted = _counted(scene, style, omitted)
    be = "are" if len(scene.things) > 1 else "is"
    variants = (f"there {be} {counted}{tail}", f"the image shows {counted}{tail}", f"{counted} {be} shown{tail}")
    return _sentence(variants[style.opening])


def _things(scene: Scene, style: Style, omitted: Container[Fact]) -> str:
    pairs = []
    for thing in scene.things:
        if Fact("thing", thing.place) not in omitted:
            where = "" if Fact("place", thing.place) in omitted else where_phrase(thing.place, style)
            pairs.append((thing_phrase(thing, style, omitted), where))
    if not pairs:
        return ""
    match style.layout:
        case "list":
            return _sentence(_joined([f"{thing} {where}".rstrip() for thing, where in pairs]))
        case "sentences":
            frame = "{thing} is {where}"
        case "places":
            frame = "{where} is {thing}"
    sentences = [(frame if where else "there is {thing}").format(thing=thing, where=where) for thing, where in pairs]
    return " ".join(map(_sentence, sentences))


def _sign(sign: Sign, style: Style, omitted: Container[Fact]) -> str:
    where = "" if Fact("sign_place") in omitted else where_phrase(sign.place, style)
    says = "" if Fact("sign") in omitted else f'{style.verb} "{sign.text}"'
    if not says:
        return _sentence(f"a sign is {where}" if where else "there is a sign")
    if style.layout == "places" and where:
        return _sentence(f"{where} a sign {says}")
    return _sentence(" ".join(filter(None, ("a sign", where, says))))
