"""What people might say of a scene: short alt texts that leave most out, and dense captions that say everything.

A dense caption fixes its style once (which synonyms, which clause order) and keeps to it, as a writer would.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from .world import Scene, Sign, Thing

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


@dataclass(frozen=True)
class Style:
    """One writer's habits, kept through a caption."""

    large: str
    small: str
    noun: str
    preposition: str
    corner: bool
    layout: Layout
    order: tuple[Clause, ...]
    opening: int
    verb: str


def sample_style(rng: Random) -> Style:
    """Common habits are drawn more often than rare ones, so that one way of saying it is the likeliest."""
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


def dense_caption(scene: Scene, rng: Random) -> str:
    """Everything there is to say: count, background, each thing with all its attributes, the sign and its word."""
    style = sample_style(rng)
    clauses = [_clause(kind, scene, style) for kind in style.order]
    return " ".join(clause for clause in clauses if clause)


def short_caption(scene: Scene, rng: Random) -> str:
    """One sentence as alt texts are: one or two things, most attributes left out, never a size or a sign's word."""
    named = rng.sample(scene.things, min(len(scene.things), rng.choice((1, 1, 2))))
    phrases = [_with_article(f"{t.color} {t.shape}" if rng.random() < 0.6 else t.shape) for t in named]
    if scene.sign is not None and rng.random() < 0.3:
        phrases.append("a sign")
    text = _joined(phrases)
    if rng.random() < 0.2:
        text += f" on a {scene.background} background"
    opening = rng.choices(("", "There is ", "A picture of ", "This is "), (6, 2, 2, 1))[0]
    return _sentence(opening + text)


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


def _counted(scene: Scene, style: Style) -> str:
    count = len(scene.things)
    return f"{NUMBERS[count]} {style.noun}{'s' if count > 1 else ''}"


def _thing(thing: Thing, style: Style) -> str:
    size = style.large if thing.size == "large" else style.small
    return _with_article(f"{size} {thing.color} {thing.shape}")


def _where(place: str, style: Style) -> str:
    corner = " corner" if style.corner and place in CORNERS else ""
    return f"{style.preposition} the {place}{corner}"


def _clause(kind: Clause, scene: Scene, style: Style) -> str:
    """One or more sentences for a kind of clause; empty where the scene has nothing of it."""
    match kind:
        case "intro":
            return _opening(scene, style, f" on a {scene.background} background")
        case "count":
            return _opening(scene, style, "")
        case "background":
            return f"The background is {scene.background}."
        case "things":
            return _things(scene, style)
        case "sign":
            return _sign(scene.sign, style) if scene.sign else ""


def _opening(scene: Scene, style: Style, tail: str) -> str:
    counted = _counted(scene, style)
    be = "are" if len(scene.things) > 1 else "is"
    variants = (f"there {be} {counted}{tail}", f"the image shows {counted}{tail}", f"{counted} {be} shown{tail}")
    return _sentence(variants[style.opening])


def _things(scene: Scene, style: Style) -> str:
    pairs = [(_thing(thing, style), _where(thing.place, style)) for thing in scene.things]
    match style.layout:
        case "list":
            return _sentence(_joined([f"{thing} {where}" for thing, where in pairs]))
        case "sentences":
            return " ".join(_sentence(f"{thing} is {where}") for thing, where in pairs)
        case "places":
            return " ".join(_sentence(f"{where} is {thing}") for thing, where in pairs)


def _sign(sign: Sign, style: Style) -> str:
    where = _where(sign.place, style)
    if style.layout == "places":
        return _sentence(f'{where} a sign {style.verb} "{sign.text}"')
    return _sentence(f'a sign {where} {style.verb} "{sign.text}"')
