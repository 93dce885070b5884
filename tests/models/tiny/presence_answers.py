"""Answers to the yes-or-no questions of :mod:`...train.texts.presence` from their words and the scene alone."""

from __future__ import annotations

import re

from capipe.models.tiny.world.captions import NUMBERS
from capipe.models.tiny.world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, WORDS, Scene, Thing

PLACE = f"(?:{'|'.join(sorted(PLACES, key=len, reverse=True))})"
NOUN = f"(?:{'|'.join(SHAPES)}|shape|object)"
SIZE, COLOR = f"(?:{'|'.join(SIZES)}|big|little)", f"(?:{'|'.join(COLORS)})"
PHRASE = (
    rf"(?:(?P<size>{SIZE}) )?(?:(?P<color>{COLOR}) )?(?P<noun>{NOUN})(?: (?:in|at) the (?P<place>{PLACE})(?: corner)?)?"
)
SYNONYMS = {"big": "large", "little": "small"}
A_THING = re.compile(rf"(?:Is there|Does the image show|Can) an? {PHRASE}(?P<end> be seen| in the image)?\?")
ATTRIBUTE = re.compile(rf"Is the {PHRASE} (?:a |in the )?(?P<value>{'|'.join((*SHAPES, *COLORS, *SIZES))}|{PLACE})\?")
BACKGROUND = re.compile(rf"Is (?:the background|there a) ({'|'.join(BACKGROUNDS)})(?: background)?\?")
COUNT = re.compile(rf"(?:Is there|Are there|Does the image show) ({'|'.join(NUMBERS[1:6])}) (?:shape|object)(s?)\?")
SIGN = re.compile(r"(?:Is there a sign(?: in the image)?|Does the image show a sign|Is there any text)\?")
SIGN_PLACE = re.compile(rf"Is (?:there a|the) sign in the ({PLACE})\?")
WORD = re.compile(
    rf'(?:Does the sign say|Is there a sign that says|Is the word) "?({"|".join(WORDS)})"?(?: in the image)?\?'
)


def described(match: re.Match[str], scene: Scene) -> list[Thing]:
    """The things of the scene that a phrase fits."""
    noun, size = match["noun"], match["size"]
    return [
        thing
        for thing in scene.things
        if noun in ("shape", "object", thing.shape)
        and (size is None or SYNONYMS.get(size, size) == thing.size)
        and match["color"] in (None, thing.color)
        and match["place"] in (None, thing.place)
    ]


def answer(text: str, scene: Scene) -> bool:
    """Whether the answer is yes. Raises AssertionError for a question that cannot be read, or names no one thing."""
    sign = scene.sign
    if match := BACKGROUND.fullmatch(text):
        return match[1] == scene.background
    if match := COUNT.fullmatch(text):
        assert (match[1] == "one") == (match[2] == "") and not text.startswith("Are there one")
        return NUMBERS.index(match[1]) == len(scene.things)
    if SIGN.fullmatch(text):
        return sign is not None
    if match := SIGN_PLACE.fullmatch(text):
        return sign is not None and sign.place == match[1]
    if match := WORD.fullmatch(text):
        return sign is not None and sign.text == match[1]
    if match := A_THING.fullmatch(text):
        return bool(described(match, scene))
    match = ATTRIBUTE.fullmatch(text)
    assert match is not None, f"not understood: {text}"
    (thing,) = described(match, scene)
    return match["value"] in (thing.shape, thing.color, thing.size, thing.place)
