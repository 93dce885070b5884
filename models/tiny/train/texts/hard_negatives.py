"""Hard negatives for image-text models: true texts about a scene, and the same texts with one error.

A false text describes a copy of the scene with one attribute changed, in the same wording otherwise; only the image
distinguishes the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from ....scorers.sentences import split_sentences
from ...world.captions import dense_caption, sample_style, short_caption, thing_phrase, where_phrase
from ...world.grade import is_true
from ...world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, WORDS, Scene, Sign, Thing
from .caption_augmentation import OMITTED_SHARES, retold, sample_omitted

CHANGES = ("color", "color", "shape", "shape", "size", "place", "background", "word", "sign_place")


@dataclass(frozen=True)
class Planted:
    """A caption with one error, the original caption, and the index of the sentence with the error."""

    text: str
    original: str
    sentence: int


def changed(scene: Scene, rng: Random) -> Scene:
    """The scene with one attribute of one thing (or of its sign, or the background) changed; things stay in order."""
    while True:
        other = _changed(scene, rng.choice(CHANGES), rng)
        if other is not None:
            return other


def _changed(scene: Scene, kind: str, rng: Random) -> Scene | None:
    at = rng.randrange(len(scene.things))
    thing = scene.things[at]
    if kind == "background":
        return replace(scene, background=_another(BACKGROUNDS, scene.background, rng))
    if kind in ("word", "sign_place"):
        return _changed_sign(scene, kind, rng)
    if kind == "place":
        free = [place for place in _between(scene, at) if place not in _taken(scene)]
        if not free:
            return None
        return _with_thing(scene, at, replace(thing, place=rng.choice(free)))
    names = {"color": COLORS, "shape": SHAPES, "size": SIZES}[kind]
    return _with_thing(scene, at, replace(thing, **{kind: _another(names, getattr(thing, kind), rng)}))


def _changed_sign(scene: Scene, kind: str, rng: Random) -> Scene | None:
    if scene.sign is None:
        return None
    if kind == "word":
        return replace(scene, sign=Sign(_another(WORDS, scene.sign.text, rng), scene.sign.place))
    free = [place for place in PLACES if place not in _taken(scene)]
    return replace(scene, sign=Sign(scene.sign.text, rng.choice(free))) if free else None


def _another(names: tuple[str, ...], name: str, rng: Random) -> str:
    return rng.choice([other for other in names if other != name])


def _taken(scene: Scene) -> set[str]:
    return {thing.place for thing in scene.things} | ({scene.sign.place} if scene.sign else set())


def _between(scene: Scene, at: int) -> list[str]:
    """Places to which thing ``at`` can move without passing another thing: sentences then keep their order."""
    order = [PLACES.index(thing.place) for thing in scene.things]
    first = order[at - 1] + 1 if at else 0
    last = order[at + 1] if at + 1 < len(order) else len(PLACES)
    return list(PLACES[first:last])


def _with_thing(scene: Scene, at: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:at], thing, *scene.things[at + 1 :]))


Telling = Callable[[Scene, Random], str]


def true_and_false(scene: Scene, rng: Random) -> tuple[str, str]:
    """A caption in any of the wordings, and the same caption made false by one changed attribute."""
    while True:
        telling, seed, other = _telling(scene, rng), rng.random(), changed(scene, rng)
        text, false = telling(scene, Random(seed)), telling(other, Random(seed))
        if text and false and text != false:  # a wording may omit everything
            return text, false


def _telling(scene: Scene, rng: Random) -> Telling:
    share = rng.choice(OMITTED_SHARES[:3])
    omitted = {fact for fact in sample_omitted(scene, rng, share) if fact.kind != "place"}
    tell = dense_caption if rng.random() < 0.6 else retold
    return lambda of, words: tell(of, words, omitted)


def sentence_pair(scene: Scene, rng: Random) -> tuple[str, str]:
    """One true sentence about the scene, and the same sentence with one error; some are alt texts."""
    while True:
        if rng.random() < 0.25:
            seed, other = rng.random(), changed(scene, rng)
            text, false = short_caption(scene, Random(seed)), short_caption(other, Random(seed))
            if text != false and not holds(scene, false):
                return text, false
            continue
        text, false = true_and_false(scene, rng)
        pairs = list(zip(split_sentences(text), split_sentences(false), strict=False))
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        if not differing:
            continue
        return differing[0]


def holds(scene: Scene, text: str) -> bool:
    """Whether everything that :mod:`...world.grade` recognises in ``text`` is true of the scene."""
    return is_true(scene, text) is not False


def addition(scene: Scene, rng: Random) -> str:
    """A sentence about a thing at an empty place."""
    free = [place for place in PLACES if place not in _taken(scene)]
    thing = Thing(rng.choice(free), rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES))
    style = sample_style(rng)
    where, phrase = where_phrase(thing.place, style), thing_phrase(thing, style)
    frames = ("there is {phrase} {where}", "{where} is {phrase}", "{phrase} is {where}", "{where} you can see {phrase}")
    sentence = rng.choice(frames).format(where=where, phrase=phrase)
    return f"{sentence[0].upper()}{sentence[1:]}."


def with_sentence(caption: str, sentence: str, rng: Random) -> tuple[str, int]:
    """The caption with a sentence inserted anywhere after its first, and the index of the inserted one."""
    sentences = split_sentences(caption)
    at = rng.randint(1, len(sentences))
    return " ".join([*sentences[:at], sentence, *sentences[at:]]), at


def plant_change(scene: Scene, rng: Random) -> Planted:
    """A dense caption in the captioner's wordings with one attribute changed."""
    while True:
        seed = rng.random()
        original = dense_caption(scene, Random(seed))
        text = dense_caption(changed(scene, rng), Random(seed))
        pairs = zip(split_sentences(original), split_sentences(text), strict=True)
        for index, (before, after) in enumerate(pairs):
            if before != after:
                return Planted(text, original, index)


def plant_addition(scene: Scene, rng: Random) -> Planted:
    """A dense caption with a sentence about an absent thing."""
    original = dense_caption(scene, rng)
    text, index = with_sentence(original, addition(scene, rng), rng)
    return Planted(text, original, index)
