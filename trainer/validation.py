"""How good captions are, by who was never a reward: a hold-out reader, and the truth where it is known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..models.engines.base import Completion, RequestError
from ..models.reader import QuizReader, Reading
from ..models.tiny.world.grade import grade
from .dataset import Example
from .evaluation.text_statistics import loops


@dataclass(frozen=True)
class Validation:
    """Figures of one caption per image, of those ``images`` that got one; ``failed`` did not, and are in no mean.

    ``accuracy``: share of scored presentations answered right; ``hallucinated``: stated attributes that are not in the
    scene, per caption, ``recalled``: the share of the scene's that is told, both None without scenes; ``tokens``: mean
    length; ``truncated``, ``repeating``: shares. None where there is nothing to take a mean of. ``reason``: why the
    first one failed.
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

    def figures(self) -> dict[str, float]:
        """What is a number, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "reason"}


async def validate(
    tasks: Sequence[Example], captions: Sequence[Completion | RequestError], reader: QuizReader
) -> Validation:
    """Grade one caption per task, where there is one. Raises EngineDead alone."""
    pairs = [(task, each) for task, each in zip(tasks, captions, strict=True) if isinstance(each, Completion)]
    failures = [str(each) for each in captions if isinstance(each, RequestError)]
    readings = await asyncio.gather(*(reader.read(caption.text, task.questions) for task, caption in pairs))
    known = [(task.scene, caption) for task, caption in pairs if task.scene is not None]
    grades = [grade(scene, caption.text) for scene, caption in known]
    expected = sum(each.expected.total() for each in grades)
    written = [caption for _, caption in pairs]
    return Validation(
        accuracy=accuracy([reading for each in readings for reading in each]),
        hallucinated=sum(each.stated.total() - each.correct.total() for each in grades) / len(grades)
        if grades
        else None,
        recalled=sum(each.recalled.total() for each in grades) / expected if expected else None,
        tokens=_mean([len(each.token_ids) for each in written]),
        truncated=_mean([each.finish_reason == "length" for each in written]),
        repeating=_mean([loops(each.text) for each in written]),
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
