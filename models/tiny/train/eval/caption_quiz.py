"""Measure a captioner by what readers answer from its captions, on scenes of one to five things and on crowded ones.

``python -m capipe.models.tiny.train.eval.caption_quiz tiny/narrow --scenes 200``
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ....bundled import resolve
from ....engines.loading import EngineConfig, load_engine
from ....quiz import Question
from ....reader import QuizReader, ReaderConfig, Reading
from ...world.captions import dense_caption
from ...world.corpus import CorpusSample, samples
from ...world.grade import total
from ...world.prompts import DENSE, PLAIN, SHORT
from ..texts.quiz import quiz, sample_asked
from .captioner import caption, graded_captions, load

READERS = ("tiny/reader", "tiny/holdout-reader")  # the first chooses the best sample
PROMPTS = {"plain": PLAIN[0], "short": SHORT[0], "dense": DENSE[0]}
SCENES = {"present": 0.0, "crowded": 1.0}  # share of crowded scenes
SIGNS = ("sign", "sign_place")
QUESTIONS = 4  # per scene
SAMPLES = 4
LONGEST = 224  # new tokens; dense captions of nine things have some 150
SEED = 4


@dataclass(frozen=True)
class QuizItem:
    """A scene, its image, and questions about it with their kinds (:data:`..texts.quiz.KINDS`)."""

    sample: CorpusSample
    questions: tuple[Question, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class CaptionMetrics:
    """Metrics of one caption per scene.

    ``accuracy``: right over scored presentations by reader, all questions except those about signs; ``signs``: of
    these, None without any; ``by_kind``: accuracy under the first reader. ``wrong``: stated attributes that are not
    the scene's, per caption; ``coverage``: share of the scene's attributes that are stated; ``tokens``, ``sentences``:
    means; ``longer``: share of captions with more than two sentences.
    """

    accuracy: dict[str, float]
    signs: dict[str, float | None]
    by_kind: dict[str, float]
    wrong: float
    coverage: float
    tokens: float
    sentences: float
    longer: float


Readings = list[list[Reading]]  # of each caption, one per question


def quiz_items(count: int, crowded: float, seed: int = SEED) -> list[QuizItem]:
    """``count`` held-out scenes with questions, the same ones for the same arguments."""
    items = []
    for index, sample in enumerate(samples(count, "heldout", seed, crowded=crowded)):
        rng = Random(f"caption quiz:{seed}:{index}")
        asked = [sample_asked(sample.scene, rng) for _ in range(QUESTIONS)]
        questions = tuple(quiz(sample.scene, each, rng) for each in asked)
        items.append(QuizItem(sample, questions, tuple(each.kind for each in asked)))
    return items


def captions_of(
    model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[QuizItem], seed: int = SEED
) -> tuple[dict[str, list[str]], list[list[str]]]:
    """Greedy captions by kind of prompt, and ``SAMPLES`` lists of captions sampled for the canonical plain prompt."""
    images = [item.sample.image for item in items]
    greedy = {kind: caption(model, processor, images, prompt, longest=LONGEST) for kind, prompt in PROMPTS.items()}
    torch.manual_seed(seed)
    sampled = [
        caption(model, processor, images, PROMPTS["plain"], sample=True, longest=LONGEST) for _ in range(SAMPLES)
    ]
    return greedy, sampled


async def read_all(reader: QuizReader, items: Sequence[QuizItem], captions: Sequence[str]) -> Readings:
    """The readings of all questions from each item's caption."""
    tasks = (reader.read(text, item.questions) for text, item in zip(captions, items, strict=True))
    return list(await asyncio.gather(*tasks))


def best_of(candidates: Sequence[Readings]) -> list[int]:
    """For each item, the index of the first candidate with the most right presentations."""
    right = [[sum(reading.right for reading in readings) for readings in candidate] for candidate in candidates]
    return [max(range(len(right)), key=lambda number: right[number][item]) for item in range(len(right[0]))]


def accuracy(readings: Readings, items: Sequence[QuizItem], kinds: Sequence[str]) -> float | None:
    """Right over scored presentations of the questions of ``kinds``; None without any."""
    pairs = zip(readings, items, strict=True)
    chosen = [r for each, item in pairs for r, kind in zip(each, item.kinds, strict=True) if kind in kinds]
    scored = sum(reading.scored for reading in chosen)
    return sum(reading.right for reading in chosen) / scored if scored else None


def metrics(
    items: Sequence[QuizItem], captions: Sequence[str], lengths: Sequence[int], readings: dict[str, Readings]
) -> CaptionMetrics:
    """Metrics of one caption per item; ``lengths``: their tokens; ``readings``: by reader, the first one's by kind."""
    grades = total(graded_captions([item.sample for item in items], captions))
    sentences = [text.count(".") for text in captions]
    kinds = sorted({kind for item in items for kind in item.kinds})
    told = [kind for kind in kinds if kind not in SIGNS]
    first = next(iter(readings.values()))
    return CaptionMetrics(
        accuracy={name: accuracy(of, items, told) or 0.0 for name, of in readings.items()},
        signs={name: accuracy(of, items, SIGNS) for name, of in readings.items()},
        by_kind={kind: accuracy(first, items, (kind,)) or 0.0 for kind in kinds},
        wrong=(grades.stated.total() - grades.correct.total()) / len(captions),
        coverage=grades.recall(),
        tokens=sum(lengths) / len(captions),
        sentences=sum(sentences) / len(captions),
        longer=sum(count > 2 for count in sentences) / len(captions),
    )


async def evaluate(
    model: PreTrainedModel, processor: ProcessorMixin, readers: dict[str, QuizReader], items: Sequence[QuizItem]
) -> dict[str, CaptionMetrics]:
    """Metrics of greedy captions by kind of prompt, of a sample, of the best of four samples, and of true captions."""
    greedy, sampled = captions_of(model, processor, items)
    oracle = [dense_caption(item.sample.scene, Random(f"oracle:{item.sample.key}")) for item in items]
    texts = greedy | {f"sample {number}": each for number, each in enumerate(sampled)} | {"oracle": oracle}
    readings = {
        system: {name: await read_all(reader, items, each) for name, reader in readers.items()}
        for system, each in texts.items()
    }
    names = [f"sample {number}" for number in range(len(sampled))]
    chosen = [names[number] for number in best_of([readings[name][next(iter(readers))] for name in names])]
    texts["best of 4"] = [texts[name][index] for index, name in enumerate(chosen)]
    readings["best of 4"] = {
        reader: [readings[name][reader][index] for index, name in enumerate(chosen)] for reader in readers
    }
    result = {}
    for system in (*greedy, names[0], "best of 4", "oracle"):
        lengths = [len(ids) for ids in processor.tokenizer(texts[system]).input_ids]
        result[system] = metrics(items, texts[system], lengths, readings[system])
    return result


async def report(folder: str, count: int, seed: int = SEED) -> dict[str, dict[str, CaptionMetrics]]:
    """Metrics by kind of scene and system of an exported captioner."""
    model, processor = load(folder)
    engines = [await load_engine(EngineConfig("transformers", name, concurrency=256)) for name in READERS]
    try:
        readers = {name: QuizReader(engine, ReaderConfig()) for name, engine in zip(READERS, engines, strict=True)}
        return {
            kind: await evaluate(model, processor, readers, quiz_items(count, crowded, seed))
            for kind, crowded in SCENES.items()
        }
    finally:
        for engine in engines:
            await engine.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="an exported captioner, or tiny/narrow")
    parser.add_argument("--scenes", type=int, default=200, help="of either kind")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    measured = asyncio.run(report(resolve(options.folder), options.scenes, options.seed))
    by_scenes = {kind: {name: asdict(row) for name, row in systems.items()} for kind, systems in measured.items()}
    print(json.dumps(by_scenes, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
