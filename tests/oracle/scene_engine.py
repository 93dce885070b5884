"""An engine that answers by the scene of a rendered image. Commands load it by its import path in their workers.

``--model`` is the corpus, as images/split/seed: ``24/heldout/31``. Beliefs are the log-probabilities of -0.05 and -3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random

from capipe.manifests.shards import uid_of
from capipe.models.engines.base import ChoiceRequest, ChoiceScores, Completion, GenerationRequest, Prompt
from capipe.models.engines.loading import EngineConfig
from capipe.models.images.grid import ImageGrid
from capipe.models.quiz import ABSTAIN
from capipe.models.tiny.world.corpus import samples
from capipe.models.tiny.world.grade import is_true
from capipe.models.tiny.world.scenes import COLORS, SHAPES, Scene

SURE, UNLIKELY = -0.05, -3.0
STATEMENT = "Statement: "


def absent_things(scene: Scene, count: int) -> list[str]:
    """Colours and shapes of the scene put together as it has them nowhere, or others if it has them all."""
    things = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    known = {(thing.color, thing.shape) for thing in scene.things}
    near = [f"a {color} {shape}" for color, _ in sorted(known) for _, shape in sorted(known)]
    return [thing for thing in dict.fromkeys([*near, *things]) if not is_true(scene, thing)][:count]


class SceneEngine:
    """Sees ``scenes`` by the uid of their image. Without an image it abstains, or takes the first option."""

    guides, concurrency = False, 4
    grid: ImageGrid | None = None
    context: int | None = None

    def __init__(self, scenes: Mapping[str, Scene]) -> None:
        self.scenes = scenes

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        question, options = asked_of(request.prompt)
        answer = self._answer(self._scene(request.prompt), question, options)
        return ChoiceScores(tuple(SURE if option == answer else UNLIKELY for option in options))

    async def generate(self, request: GenerationRequest) -> Completion:
        scene = self._scene(request.prompt)
        assert scene is not None
        if "not in the image" in request.prompt.text:
            there = f"a {scene.things[0].color} {scene.things[0].shape}"  # which only screening finds out
            text = json.dumps({"things": [*absent_things(scene, 2), there]})
        else:
            options = [scene.background, next(each for each in ("white", "black") if each != scene.background)]
            Random(request.sampling.seed).shuffle(options)
            question = {"kind": "background", "question": "What color is the background?", "options": options}
            text = json.dumps({"questions": [{**question, "answer": scene.background}]})
        return Completion(text, (), "stop", len(text.split()))

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return len(prompt.text.split())

    async def aclose(self) -> None: ...

    def _scene(self, prompt: Prompt) -> Scene | None:
        return None if prompt.image is None else self.scenes[prompt.image.uid]

    @staticmethod
    def _answer(scene: Scene | None, question: str, options: Sequence[str]) -> str:
        if scene is None:
            return ABSTAIN if ABSTAIN in options else options[0]
        if "background?" in question:
            return scene.background
        return "Yes" if is_true(scene, question.partition(STATEMENT)[2] or question) else "No"


def asked_of(prompt: Prompt) -> tuple[str, list[str]]:
    """The question that a prompt ends with, and its options in order."""
    lines = prompt.text[prompt.text.rindex("Question: ") :].strip().splitlines()
    return lines[0].removeprefix("Question: "), [line.partition(". ")[2] for line in lines[1:]]


def make_engine(config: EngineConfig) -> SceneEngine:
    count, split, seed = config.model.split("/")
    assert split in ("train", "heldout")
    return SceneEngine({uid_of(sample.image): sample.scene for sample in samples(int(count), split, int(seed))})
