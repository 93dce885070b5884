"""An engine that answers by a function of the request: failures and nonsense that no real model gives to order."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from capipe.models.engines.base import ChoiceRequest, ChoiceScores, Completion, GenerationRequest, ImageInput, Prompt
from capipe.models.images.grid import ImageGrid
from capipe.models.quiz import ABSTAIN, LETTERS

Scores = Sequence[float | None]
SURE, NEVER = -0.01, -9.0


class Scripted:
    """Remembers all requests. ``choose`` gives scores, ``generate`` a text or a Completion; either gives an error."""

    concurrency = 4
    grid: ImageGrid | None = None
    guides = False
    context: int | None = None

    def __init__(
        self,
        choose: Callable[[ChoiceRequest], Scores | Exception] | None = None,
        generate: Callable[[GenerationRequest], str | Completion | Exception] | None = None,
    ) -> None:
        self._choose, self._generate = choose, generate
        self.choices, self.generations = list[ChoiceRequest](), list[GenerationRequest]()

    async def generate(self, request: GenerationRequest) -> Completion:
        assert self._generate is not None, "nobody may ask for text here"
        self.generations.append(request)
        answer = self._generate(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Completion) else Completion(answer, (), "stop", len(answer.split()))

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        assert self._choose is not None, "nobody may ask for a choice here"
        self.choices.append(request)
        scores = self._choose(request)
        if isinstance(scores, Exception):
            raise scores
        return ChoiceScores(tuple(scores))

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return None if self.context is None else len(prompt.text.split())

    async def aclose(self) -> None: ...


def options_of(prompt: Prompt) -> dict[str, str]:
    """What stands behind each letter of the question that the prompt ends with."""
    question = prompt.text[prompt.text.rindex("Question: ") :]
    return {text: letter for letter, text in re.findall(r"^([A-K])\. (.*)$", question, re.MULTILINE)}


def pick(request: ChoiceRequest, letter: str) -> list[float]:
    """Scores that favour one letter."""
    return [SURE if each == letter else NEVER for each in request.choices]


def knows(request: ChoiceRequest, *answers: str) -> list[float]:
    """Picks the option with one of these texts, else abstains."""
    options = options_of(request.prompt)
    return pick(request, next((options[each] for each in answers if each in options), options.get(ABSTAIN, LETTERS[0])))


IMAGE = ImageInput("u" * 32)
