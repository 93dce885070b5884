"""Questions about things that are not in the image: "Is there a dog in the image?", answered no.

They price what a caption makes up: from a caption that says so, a reader answers yes. The writer names the things, and
screening keeps a question only if the model that sees the image answers no in every order, and the one that does not
see it never does.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ...models.engines.base import Completion
from ...models.quiz import ABSENT, ASK_ABSENT, YES_NO
from .layouts import faulty
from .validate import RawQuestion

MOST_WORDS = 8  # of a thing: a longer one is a sentence, or the writer's doubts
_MOST_FAILURES = 100  # brackets in one answer that begin no JSON
_ARTICLES = frozenset({"a", "an", "the", "any", "some"})
_PHRASE = re.compile(r"[^\W\d_][^?!.:;\"\n]*")


def absent_questions(completion: Completion, most: int) -> list[RawQuestion]:
    """At most ``most`` questions from a writer's answer, with a fault for what is no thing; one fault if there is none.

    Accepts ``{"things": [...]}`` or a bare list, also within prose.
    """
    text = completion.text.strip()
    things = _things(text)
    if things is None:
        return [faulty("no JSON with absent things" if text else "the model named no absent thing")]
    return [_question(thing) for thing in things[:most]] or [faulty("the list of absent things is empty")]


def _question(thing: Any) -> RawQuestion:
    if not isinstance(thing, str):
        return faulty(f"a {type(thing).__name__} where an absent thing was expected")
    words = thing.strip().rstrip(".").split()
    phrase = " ".join(words)
    if not words or len(words) > MOST_WORDS or not _PHRASE.fullmatch(phrase):
        return faulty(f"{thing[:60]!r} is not the name of a thing")
    named = words[0].lower() in _ARTICLES
    phrase = " ".join([words[0].lower(), *words[1:]]) if named else f"any {phrase}"
    return RawQuestion(ASK_ABSENT.format(thing=phrase), list(YES_NO), YES_NO[1], ABSENT)


def _things(text: str) -> list[Any] | None:
    """The first list of things in a text, None without one.

    Stops after some brackets that begin no JSON: each may scan the rest of the text.
    """
    decoder, failures = json.JSONDecoder(), 0
    for found in re.finditer(r"[{\[]", text):
        try:
            value, _ = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            failures += 1
            if failures == _MOST_FAILURES:
                return None
            continue
        things = value.get("things") if isinstance(value, dict) else value
        if isinstance(things, list):
            return things
    return None
