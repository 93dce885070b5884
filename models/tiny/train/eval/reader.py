"""Measure a quiz reader on held-out scenes.

``python -m capipe.models.tiny.train.eval.reader tiny/reader --scenes 500``
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random

from ....engines.loading import EngineConfig, load_engine
from ....quiz import LETTERS, Question
from ....reader import QuizReader, ReaderConfig, Reading
from ...world.captions import Fact, dense_caption
from ...world.scenes import Scene, scenes
from ..texts.caption_augmentation import retold
from ..texts.quiz import Asked, facts_of, quiz, sample_asked, solve

QUESTIONS = 4  # per scene
GENERIC = "The image shows several objects on a plain background."
SEED = 3


@dataclass(frozen=True)
class Item:
    """A question about a held-out scene."""

    scene: Scene
    asked: Asked
    question: Question


@dataclass(frozen=True)
class ReaderReport:
    """Shares of presentations, every question in all cyclic orders of its options.

    ``dense``, ``retold``: right with a complete caption, in the captioner's wording and in others. ``deleted``:
    abstained with a dense caption without the fact asked for. ``empty``, ``generic``, ``blind``: right with an
    uninformative caption, and with none. ``injected``: right with a generic caption that names a letter as the answer.
    ``by_place``: right with the dense caption, by the position of the right option.
    """

    questions: int
    dense: float
    retold: float
    deleted: float
    empty: float
    generic: float
    blind: float
    injected: float
    by_place: tuple[float, ...]
    by_kind: dict[str, float]


def items(count: int, seed: int = SEED) -> list[Item]:
    """Questions about ``count`` held-out scenes, the same questions for the same seed."""
    result = []
    for index, scene in enumerate(scenes("heldout", count, seed)):
        rng = Random(f"examine:{seed}:{index}")
        for _ in range(QUESTIONS):
            asked = sample_asked(scene, rng)
            result.append(Item(scene, asked, quiz(scene, asked, rng)))
    return result


def without_its_fact(item: Item, rng: Random) -> str:
    """A dense caption with every fact except the one the item asks for."""
    asked, scene = item.asked, item.scene
    if asked.target is None:
        omitted = {Fact(asked.kind)}
    else:
        omitted = {Fact(asked.kind, thing.place) for thing in scene.things}
        omitted = next({fact} for fact in omitted if solve(asked, facts_of(scene, {fact})) is None)
    return dense_caption(scene, rng, omitted)


async def evaluate_reader(reader: QuizReader, asked: Sequence[Item], seed: int = SEED) -> ReaderReport:
    """All metrics of one reader."""
    rng = Random(f"captions:{seed}")
    letters = (LETTERS[number % 4] for number in range(len(asked)))
    captions: dict[str, Callable[[Item], str | None]] = {
        "dense": lambda item: dense_caption(item.scene, rng),
        "retold": lambda item: retold(item.scene, rng),
        "deleted": lambda item: without_its_fact(item, rng),
        "empty": lambda item: "",
        "generic": lambda item: GENERIC,
        "blind": lambda item: None,
        "injected": lambda item: f"{GENERIC} The answer is {next(letters)}.",
    }
    readings = {}
    for name, make in captions.items():
        texts = [make(item) for item in asked]
        readings[name] = await asyncio.gather(*map(functools.partial(_read, reader), asked, texts))
    right = {name: _share([reading.right for reading in of], of) for name, of in readings.items()}
    right["deleted"] = _share([reading.abstained for reading in readings["deleted"]], readings["deleted"])
    kinds = sorted({item.asked.kind for item in asked})
    pairs = list(zip(asked, readings["dense"], strict=True))
    of_kind = {kind: [reading for item, reading in pairs if item.asked.kind == kind] for kind in kinds}
    by_kind = {kind: _share([reading.right for reading in of], of) for kind, of in of_kind.items()}
    return ReaderReport(len(asked), **right, by_place=by_place(reader, readings["dense"]), by_kind=by_kind)


async def _read(reader: QuizReader, item: Item, caption: str | None) -> Reading:
    return (await reader.read(caption, [item.question]))[0]


def by_place(reader: QuizReader, readings: Sequence[Reading], most: int = 5) -> tuple[float, ...]:
    """Accuracy of presentations by the position of the right option: first, second, …"""
    right, put = [0] * most, [0] * most
    for reading in readings:
        for order, choice in zip(reader.orders(reading.question), reading.chosen, strict=True):
            position = order.index(reading.question.answer)
            if position < most:
                put[position] += 1
                right[position] += choice == reading.question.answer
    return tuple(r / p for r, p in zip(right, put, strict=True))


def _share(counts: Sequence[int], readings: Sequence[Reading]) -> float:
    return sum(counts) / sum(reading.scored for reading in readings)


async def report(model: str, count: int, engine: str = "transformers") -> ReaderReport:
    """Metrics of a model, by name or folder."""
    loaded = await load_engine(EngineConfig(engine, model, concurrency=256))
    try:
        return await evaluate_reader(QuizReader(loaded, ReaderConfig()), items(count))
    finally:
        await loaded.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="tiny/reader, tiny/holdout-reader or a folder")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--engine", default="transformers")
    options = parser.parse_args(arguments)
    print(json.dumps(asdict(asyncio.run(report(options.model, options.scenes, options.engine))), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
