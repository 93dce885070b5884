"""Validation of captions by measures that were never rewards: a hold-out reader, and the true scene if known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ...models.engines.base import Completion, RequestError
from ...models.reader import QuizReader, Reading
from ...models.tiny.world.grade import grade
from ..dataset import Example
from .text_statistics import loops


@dataclass(frozen=True)
class Validation:
    """Metrics of one caption per image, over ``images`` images; ``failed`` others got none and are in no mean.

    ``accuracy``: share of scored presentations answered right; ``hallucinated``: stated attributes not in the scene,
    per caption; ``recalled``: share of the scene's attributes that are stated; both None without scenes; ``tokens``:
    mean length; ``truncated``, ``repeating``: shares. None for a mean of nothing. ``reason``: the first failure's.
    """

    accuracy: float | None
    hallucinated: float | None
    recalled: float | None
    tokens: float | None
    truncated: float | None
    repeating: float | None
    images: int
    failed: int
    reason: str = ""

    def metrics(self) -> dict[str, float]:
        """Numeric metrics by name."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "reason"}


async def validate(
    examples: Sequence[Example], captions: Sequence[Completion | RequestError], reader: QuizReader
) -> Validation:
    """Grade one caption per example, if there is one. Raises only EngineDead."""
    pairs = [
        (example, caption)
        for example, caption in zip(examples, captions, strict=True)
        if isinstance(caption, Completion)
    ]
    failures = [str(error) for error in captions if isinstance(error, RequestError)]
    readings = await asyncio.gather(*(reader.read(caption.text, example.questions) for example, caption in pairs))
    known = [(example.scene, caption) for example, caption in pairs if example.scene is not None]
    grades = [grade(scene, caption.text) for scene, caption in known]
    expected = sum(graded.expected.total() for graded in grades)
    written = [caption for _, caption in pairs]
    return Validation(
        accuracy=accuracy([reading for of_caption in readings for reading in of_caption]),
        hallucinated=sum(graded.stated.total() - graded.correct.total() for graded in grades) / len(grades)
        if grades
        else None,
        recalled=sum(graded.recalled.total() for graded in grades) / expected if expected else None,
        tokens=_mean([len(caption.token_ids) for caption in written]),
        truncated=_mean([caption.finish_reason == "length" for caption in written]),
        repeating=_mean([loops(caption.text) for caption in written]),
        images=len(written),
        failed=len(failures),
        reason=next(iter(failures), ""),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def accuracy(readings: Sequence[Reading]) -> float | None:
    """Right over scored presentations of all questions; None without any."""
    scored = sum(reading.scored for reading in readings)
    return sum(reading.right for reading in readings) / scored if scored else None
