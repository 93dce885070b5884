"""Quiz questions about scenes, and their answers from the scene, from a caption's facts, or from the question alone."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from ....quiz import Question
from ...world.captions import NUMBERS, Fact
from ...world.grade import Facts, SignClaim, ThingClaim
from ...world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, WORDS, Scene

COUNTS = NUMBERS[1:6]
POOLS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "size": SIZES,
    "place": PLACES,
    "background": BACKGROUNDS,
    "count": COUNTS,
    "sign": WORDS,
    "sign_place": PLACES,
}
KINDS = tuple(POOLS)
PUBLIC_KIND = {"place": "position", "sign": "text", "sign_place": "position"}  # the quiz's names, where they differ
IDENTIFYING = {  # the attributes by which a question of each kind may identify a shape
    "color": (("place",), ("shape",), ("shape", "place"), ("size", "shape")),
    "shape": (("place",), ("color",), ("color", "place"), ("size", "color")),
    "size": (("place",), ("shape",), ("color", "shape")),
    "place": (("shape",), ("color",), ("color", "shape"), ("size", "color", "shape")),
}
FRAMES: dict[str, tuple[str, ...]] = {
    "color": ("What color is {it}?", "What is the color of {it}?", "Which color does {it} have?"),
    "shape": ("What shape is {it}?", "What is the shape of {it}?", "Which shape does {it} have?"),
    "size": ("What size is {it}?", "How large is {it}?", "Which size does {it} have?"),
    "place": ("Where is {it}?", "In which part of the image is {it}?", "Where can {it} be seen?"),
    "background": ("What color is the background?", "Which color does the background have?"),
    "count": ("How many shapes are there?", "How many objects does the image show?", "How many shapes can be seen?"),
    "sign": ("What does the sign say?", "Which word is on the sign?", "What can be read on the sign?"),
    "sign_place": ("Where is the sign?", "In which part of the image is the sign?", "Where can the sign be seen?"),
}
PLACE_FRAMES = ("What is in the {place}?", "Which shape is in the {place}?")  # for shapes identified by place alone
OPTION_COUNTS = (2, 3, 4, 4, 4, 4, 5, 6)
SCENE_SHARE = 0.6  # probability of using a distractor that occurs elsewhere in the image


@dataclass(frozen=True)
class Asked:
    """Subject of a question: an attribute (``kind``) of the shape that ``target`` identifies, or of the scene."""

    kind: str
    target: ThingClaim | None = None

    @property
    def leaks(self) -> bool:
        """Whether the question gives away its answer."""
        return self.target is not None and bool(getattr(self.target, self.kind))  # an unnamed shape is ""


def facts_of(scene: Scene, omitted: Container[Fact] = ()) -> Facts:
    """Facts of a caption without ``omitted``: as by :func:`...world.grade.parse`, except for shapes without a name."""
    things = []
    for thing in scene.things:
        if Fact("thing", thing.place) not in omitted:
            kept = {k: getattr(thing, k) for k in ("color", "size", "place") if Fact(k, thing.place) not in omitted}
            things.append(ThingClaim("" if Fact("shape", thing.place) in omitted else thing.shape, **kept))
    signs: tuple[SignClaim, ...] = ()
    if scene.sign is not None and Fact("plate") not in omitted:
        text = None if Fact("sign") in omitted else scene.sign.text
        signs = (SignClaim(text, None if Fact("sign_place") in omitted else scene.sign.place),)
    backgrounds = () if Fact("background") in omitted else (scene.background,)
    return Facts(tuple(things), signs, backgrounds, () if Fact("count") in omitted else (len(scene.things),))


def solve(asked: Asked, facts: Facts) -> str | None:
    """The answer according to ``facts``; None if no thing or more than one matches, or the fact is missing."""
    match asked.kind:
        case "background":
            return facts.backgrounds[0] if facts.backgrounds else None
        case "count":
            return NUMBERS[facts.counts[0]] if facts.counts else None
        case "sign":
            return facts.signs[0].text if facts.signs else None
        case "sign_place":
            return facts.signs[0].place if facts.signs else None
    assert asked.target is not None
    matches = [claim for claim in facts.things if _is(claim, asked.target)]
    return (getattr(matches[0], asked.kind) or None) if len(matches) == 1 else None


def _is(claim: ThingClaim, target: ThingClaim) -> bool:
    return all(
        getattr(claim, kind) == wanted
        for kind in ("shape", "color", "size", "place")
        if (wanted := getattr(target, kind) or None)
    )


def possible(scene: Scene) -> list[Asked]:
    """All questions about a scene that have exactly one answer and do not give it away."""
    asked = [Asked("background"), Asked("count")]
    if scene.sign is not None:
        asked += [Asked("sign"), Asked("sign_place")]
    whole = facts_of(scene)
    for thing in whole.things:
        for kind, ways in IDENTIFYING.items():
            asked += [Asked(kind, _pointed(thing, way)) for way in ways]
    return [candidate for candidate in asked if solve(candidate, whole) is not None]


def _pointed(thing: ThingClaim, attributes: tuple[str, ...]) -> ThingClaim:
    pointed = ThingClaim("")
    for kind in attributes:
        pointed = _known(pointed, kind, getattr(thing, kind))
    return pointed


def _known(thing: ThingClaim, kind: str, value: str | None) -> ThingClaim:
    attributes: dict[str, Any] = {kind: value}
    return replace(thing, **attributes)


def leaking(asked: Asked, scene: Scene) -> Asked:
    """The same question with its answer given away; scene-wide questions cannot and are returned unchanged."""
    if asked.target is None:
        return asked
    return replace(asked, target=_known(asked.target, asked.kind, solve(asked, facts_of(scene))))


def sample_asked(scene: Scene, rng: Random) -> Asked:
    """A random question; all kinds are equally likely, however many ways there are to ask them."""
    choices = possible(scene)
    kind = rng.choice(sorted({asked.kind for asked in choices}))
    return rng.choice([asked for asked in choices if asked.kind == kind])


def ask(asked: Asked, rng: Random) -> str:
    """The question as text."""
    frame = rng.choice(FRAMES[asked.kind])
    if asked.kind == "shape" and asked.target is not None and asked.target == ThingClaim("", place=asked.target.place):
        frame = rng.choice((*FRAMES["shape"], *PLACE_FRAMES))
    if asked.target is None:
        return frame
    return frame.format(it=pointer(asked.target, rng), place=asked.target.place)


def pointer(target: ThingClaim, rng: Random) -> str:
    """ "the large star", "the red object in the top left"."""
    noun = target.shape or rng.choice(("shape", "shape", "object"))
    words = ["the", *(word for word in (target.size, target.color) if word), noun]
    if target.place:
        words.append(f"{rng.choice(('in', 'in', 'at'))} the {target.place}")
    return " ".join(words)


def understand(text: str) -> Asked | None:
    """Parse a question: the inverse of :func:`ask`; None for any other wording."""
    for kind, frame in _PATTERNS:
        match = frame.fullmatch(" ".join(text.split()))
        if match is None:
            continue
        groups = match.groupdict()
        if not groups:
            return Asked(kind)
        shape = groups.get("shape") or ""
        named = "" if shape in ("shape", "object") else shape
        return Asked(kind, ThingClaim(named, groups.get("color"), groups.get("size"), groups["place"]))
    return None


def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    place = f"(?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))})"
    size, color = f"(?:(?P<size>{'|'.join(SIZES)}) )?", f"(?:(?P<color>{'|'.join(COLORS)}) )?"
    pointer = f"the {size}{color}(?P<shape>{'|'.join(SHAPES)}|shape|object)(?: (?:in|at) the {place})?"
    frames = [(kind, frame) for kind, frames in FRAMES.items() for frame in frames]
    frames += [("shape", frame) for frame in PLACE_FRAMES]
    written = [(kind, re.escape(frame).replace(r"\ ", " ")) for kind, frame in frames]
    filled = [(kind, text.replace(r"\{it\}", pointer).replace(r"\{place\}", place)) for kind, text in written]
    return [(kind, re.compile(text)) for kind, text in filled]


_PATTERNS = _patterns()


def quiz(scene: Scene, asked: Asked, rng: Random) -> Question:
    """A question about ``scene`` with 2 to 6 options, some of them from elsewhere in it."""
    right = solve(asked, facts_of(scene))
    assert right is not None, f"{asked} has no answer in {scene}"
    options = [right, *_distractors(scene, asked.kind, right, rng)]
    rng.shuffle(options)
    return Question(ask(asked, rng), tuple(options), options.index(right), PUBLIC_KIND.get(asked.kind, asked.kind))


def _distractors(scene: Scene, kind: str, right: str, rng: Random) -> list[str]:
    crowd = kind == "count" and right not in COUNTS
    pool = [value for value in (NUMBERS[1:] if crowd else POOLS[kind]) if value != right]
    count = min(rng.choice(OPTION_COUNTS) - 1, len(pool))
    places = [scene.sign.place] if scene.sign else []
    seen = {
        "color": [thing.color for thing in scene.things],
        "shape": [thing.shape for thing in scene.things],
        "place": [thing.place for thing in scene.things] + places,
        "sign_place": [thing.place for thing in scene.things],
        "background": [thing.color for thing in scene.things],
    }.get(kind, [])
    near = [value for value in dict.fromkeys(seen) if value in pool]
    rng.shuffle(near)
    chosen = [value for value in near[:count] if rng.random() < SCENE_SHARE]
    return chosen + rng.sample([value for value in pool if value not in chosen], count - len(chosen))
