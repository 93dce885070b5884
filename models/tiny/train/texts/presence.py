"""Yes-or-no questions about what a scene shows or does not show, with their answers from the scene graph.

What is absent is close to what is there: a thing of the scene with one attribute changed, most often to one that
another thing has, so that no question is answered by its words or by one attribute alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from ...world.captions import NUMBERS, Fact, sample_style, thing_phrase, where_phrase
from ...world.scenes import PLACES, Scene, Thing
from .quiz import COUNTS, POOLS, SCENE_SHARE, facts_of, pointer, possible, solve

DESCRIBED: dict[str, tuple[tuple[str, ...], ...]] = {  # the attributes by which a question of each kind tells a thing
    "shape": (("shape",),),
    "color": (("color",),),
    "thing": (("size",), ("color", "shape"), ("size", "shape"), ("size", "color"), ("size", "color", "shape")),
    "place": (("place",), ("shape", "place"), ("color", "place"), ("size", "color", "shape", "place")),
}
ATTRIBUTES = ("shape", "color", "size", "place")
FRAMES = ("Is there {it}?", "Is there {it}?", "Does the image show {it}?", "Can {it} be seen?")
WHOLE_FRAMES = (*FRAMES, "Is there {it} in the image?")  # for things without a place
ATTRIBUTE_FRAMES = {
    "color": "Is {it} {value}?",
    "size": "Is {it} {value}?",
    "shape": "Is {it} a {value}?",
    "place": "Is {it} in the {value}?",
}
BACKGROUND_FRAMES = ("Is the background {value}?", "Is there a {value} background?")
COUNT_FRAMES = ("Are there {value}?", "Does the image show {value}?")
SIGN_FRAMES = ("Is there a sign?", "Is there a sign in the image?", "Does the image show a sign?", "Is there any text?")
SIGN_PLACE_FRAMES = ("Is there a sign in the {value}?", "Is the sign in the {value}?")
WORD_FRAMES = (
    "Does the sign say {value}?",
    "Is there a sign that says {value}?",
    "Is the word {value} in the image?",
)
ATTEMPTS = 20  # at a description of nothing in the scene: one that has all five shapes lacks none


@dataclass(frozen=True)
class Presence:
    """A yes-or-no question; ``holds``: whether the answer is yes; ``kind``: one of :data:`PRESENCE_KINDS`."""

    text: str
    holds: bool
    kind: str


def sample_presence(scene: Scene, rng: Random, kind: str | None = None) -> Presence:
    """A random question, of a random kind by default; as many are to be answered yes as no, where the scene allows."""
    kind = kind or rng.choice(PRESENCE_KINDS)
    text, holds = _SAMPLED[kind](scene, kind, rng)
    return Presence(text, holds, kind)


def _described(scene: Scene, kind: str, rng: Random) -> tuple[str, bool]:
    kept, wanted = rng.choice(DESCRIBED[kind]), rng.random() < 0.5
    thing = rng.choice(scene.things)
    for _ in range(0 if wanted else ATTEMPTS):
        other = _changed(scene, rng.choice(scene.things), rng.choice(kept), rng)
        if not _shows(scene, other, kept):
            thing = other
            break
    style = sample_style(rng)
    omitted = {Fact(attribute, thing.place) for attribute in ATTRIBUTES if attribute not in kept}
    phrase = thing_phrase(thing, style, omitted)
    if "place" in kept:
        phrase = f"{phrase} {where_phrase(thing.place, style)}"
    return rng.choice(FRAMES if "place" in kept else WHOLE_FRAMES).format(it=phrase), _shows(scene, thing, kept)


def _changed(scene: Scene, thing: Thing, attribute: str, rng: Random) -> Thing:
    """The thing with another value of one attribute; never at the sign's place, which some may call a thing's."""
    taken = {getattr(thing, attribute), *([scene.sign.place] if scene.sign else [])}
    return replace(thing, **{attribute: _another(scene, attribute, taken, rng)})


def _another(scene: Scene, attribute: str, taken: set[str], rng: Random) -> str:
    """A value of an attribute that is not in ``taken``, often one of another thing."""
    near: list[str] = [value for other in scene.things if (value := getattr(other, attribute)) not in taken]
    if near and rng.random() < SCENE_SHARE:
        return rng.choice(near)
    return rng.choice([value for value in POOLS[attribute] if value not in taken])


def _shows(scene: Scene, thing: Thing, kept: tuple[str, ...]) -> bool:
    """Whether any thing of the scene has the ``kept`` attributes of ``thing``."""
    return any(all(getattr(other, name) == getattr(thing, name) for name in kept) for other in scene.things)


def _attribute(scene: Scene, kind: str, rng: Random) -> tuple[str, bool]:
    """ "Is the red object a star?", about a thing that the question identifies."""
    asked_for = [asked for asked in possible(scene) if asked.target is not None]
    attribute = rng.choice(sorted({asked.kind for asked in asked_for}))
    asked = rng.choice([asked for asked in asked_for if asked.kind == attribute])
    right = solve(asked, facts_of(scene))
    assert right is not None and asked.target is not None
    value = right if rng.random() < 0.5 else _another(scene, attribute, {right}, rng)
    return ATTRIBUTE_FRAMES[attribute].format(it=pointer(asked.target, rng), value=value), value == right


def _background(scene: Scene, kind: str, rng: Random) -> tuple[str, bool]:
    value = _either(scene.background, POOLS["background"], rng)
    return rng.choice(BACKGROUND_FRAMES).format(value=value), value == scene.background


def _count(scene: Scene, kind: str, rng: Random) -> tuple[str, bool]:
    right = NUMBERS[len(scene.things)]
    value = _either(right, COUNTS, rng)
    noun = rng.choice(("shape", "object")) + ("" if value == NUMBERS[1] else "s")
    text = rng.choice(COUNT_FRAMES).format(value=f"{value} {noun}")
    return text.replace("Are there one", "Is there one"), value == right


def _sign(scene: Scene, kind: str, rng: Random) -> tuple[str, bool]:
    """Whether there is a sign, and where; a question for the place of none is answered no."""
    if rng.random() < 0.5:
        return rng.choice(SIGN_FRAMES), scene.sign is not None
    if scene.sign is None:
        return SIGN_PLACE_FRAMES[0].format(value=rng.choice(PLACES)), False
    value = _either(scene.sign.place, PLACES, rng)
    return rng.choice(SIGN_PLACE_FRAMES).format(value=value), value == scene.sign.place


def _word(scene: Scene, kind: str, rng: Random) -> tuple[str, bool]:
    right = scene.sign.text if scene.sign else ""
    value = _either(right, POOLS["sign"], rng) if right else rng.choice(POOLS["sign"])
    frame = rng.choice(WORD_FRAMES)
    return frame.format(value=f'"{value}"' if rng.random() < 0.7 else value), value == right


def _either(right: str, pool: tuple[str, ...], rng: Random) -> str:
    return right if rng.random() < 0.5 else rng.choice([value for value in pool if value != right])


_SAMPLED: dict[str, Callable[[Scene, str, Random], tuple[str, bool]]] = {
    **dict.fromkeys(DESCRIBED, _described),
    "attribute": _attribute,
    "background": _background,
    "count": _count,
    "sign": _sign,
    "word": _word,
}
PRESENCE_KINDS = tuple(_SAMPLED)
