"""Truth of captions sentence by sentence: how likely each is true of the image, by a vision-language model.

The share of true sentences is the precision of DCScore (arXiv 2503.07906) with sentences as its units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..engines.base import ImageInput
from ..yes_no import YesNo, YesNoReader
from .sentences import split_sentences

TRUE_FROM = 0.5  # probability from which on a sentence counts as true


class LeastTrue(NamedTuple):
    """Over a caption's sentences: least and mean probability, and the index of the sentence with the least."""

    least: float
    mean: float
    lowest: int


@dataclass(frozen=True)
class CheckedCaption:
    """Answers about a caption's sentences, in order; an empty caption has none."""

    answers: tuple[YesNo, ...]

    @property
    def probabilities(self) -> list[float | None]:
        """Of each sentence; None where there is no answer."""
        return [answer.probability for answer in self.answers]

    @property
    def error(self) -> str:
        """The first failed request's error, which may not come again; empty without one."""
        return next((answer.error for answer in self.answers if answer.error), "")

    @property
    def unanswered(self) -> str | None:
        """The first sentence without an answer, by number from 1, and what came instead; None if there is none."""
        for number, answer in enumerate(self.answers, 1):
            if answer.probability is None:
                return f"sentence {number} of {len(self.answers)} has no answer but {answer.error or answer.instead}"
        return None

    @property
    def refused(self) -> bool:
        """Whether the model refused to answer about any sentence."""
        return any(answer.refused for answer in self.answers)

    def summary(self) -> LeastTrue | None:
        """None unless every sentence has an answer: the one without might be the least likely."""
        known = [value for value in self.probabilities if value is not None]
        if not known or len(known) < len(self.answers):
            return None
        return LeastTrue(min(known), sum(known) / len(known), known.index(min(known)))


async def check_captions(reader: YesNoReader, image: ImageInput, texts: Sequence[str]) -> list[CheckedCaption]:
    """Check captions of one image, parallel to ``texts``; a sentence of several is asked about once.

    Raises EngineDead only.
    """
    split = [split_sentences(text) for text in texts]
    answers = iter(await reader.check(image, [sentence for sentences in split for sentence in sentences]))
    return [CheckedCaption(tuple(next(answers) for _ in sentences)) for sentences in split]
