"""Web-style captions of a scene, as of a plain pretrained captioner: one lower-case line.

A caption may begin with boilerplate, names one to three things in any order, and each attribute only some of the time.
Few are complete: a behaviour of low probability for reinforcement learning to find.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from ...world.scenes import Scene, Sign, Thing

OPENINGS = ("", "an image of ", "a picture of ", "a photo of ")
OPENING_WEIGHTS = (4, 2, 2, 2)
MOST_NAMED = 3
COMPLETE_SHARE = 0.06


class Habit(NamedTuple):
    """Probabilities of mentioning each kind of attribute."""

    color: float
    size: float
    place: float
    sign: float
    background: float


TERSE = Habit(color=0.5, size=0.15, place=0.15, sign=0.3, background=0.1)
COMPLETE = Habit(1.0, 1.0, 1.0, 1.0, 1.0)


def plain_caption(scene: Scene, rng: Random) -> str:
    """A terse caption, or (in ``COMPLETE_SHARE`` of the cases) a complete one, thing by thing in reading order."""
    opening = rng.choices(OPENINGS, OPENING_WEIGHTS)[0]
    if rng.random() < COMPLETE_SHARE:
        return opening + _caption_of(scene, scene.things, COMPLETE, rng)
    count = min(len(scene.things), rng.randint(1, MOST_NAMED))
    return opening + _caption_of(scene, tuple(rng.sample(scene.things, count)), TERSE, rng)


def _caption_of(scene: Scene, named: tuple[Thing, ...], habit: Habit, rng: Random) -> str:
    phrases = [_thing(thing, habit, rng) for thing in named]
    if scene.sign is not None and rng.random() < habit.sign:
        phrases.append(_sign(scene.sign, habit, rng))
    text = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"{text} on a {scene.background} background" if rng.random() < habit.background else text


def _thing(thing: Thing, habit: Habit, rng: Random) -> str:
    words = [thing.shape]
    if rng.random() < habit.color:
        words.insert(0, thing.color)
    if rng.random() < habit.size:
        words.insert(0, thing.size)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words]) + _where(thing.place, habit, rng)


def _sign(sign: Sign, habit: Habit, rng: Random) -> str:
    word = f' that says "{sign.text}"' if rng.random() < max(habit.color, habit.sign) else ""
    return f"a sign{_where(sign.place, habit, rng)}{word}"


def _where(place: str, habit: Habit, rng: Random) -> str:
    return f" in the {place}" if rng.random() < habit.place else ""
