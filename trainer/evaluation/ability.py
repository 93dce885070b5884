"""A reader's ability: accuracy from captions that state the answers, against accuracy without any caption.

The self-oracle caption (each question followed by its right option) needs no truth about the image. A reader that
gains nothing from it measures nothing, and a captioner rewarded by it learns noise.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from ...models.quiz import LETTERS, self_oracle
from ...models.reader import QuizReader, Reading
from ...models.tiny.world.captions import dense_caption
from ..dataset import Example
from .results import Caution

SELF_ORACLE, ORACLE, BLIND = "self-oracle", "oracle", "blind"  # names of an evaluation's controls
LEAST_GAIN = 0.2  # minimum gain in accuracy over no caption
MOST_APART = 0.2  # maximum range of accuracies by position of the right option
LEAST_OF_PLACE = 20  # minimum presentations for the accuracy of a position


@dataclass
class PositionCounts:
    """Right answers by position of the right option.

    Relative to each question's own mean: questions with many options are harder, and only they have late positions.
    """

    above: dict[int, float] = field(default_factory=dict)  # sum of (right - the question's own mean)
    count: Counter[int] = field(default_factory=Counter)
    right: int = 0

    def add(self, places: Sequence[int], hits: Sequence[bool | None]) -> None:
        """Add a question's presentations: positions of the right option, whether it was chosen (None: no answer)."""
        known = [(position, hit) for position, hit in zip(places, hits, strict=True) if hit is not None]
        own = sum(hit for _, hit in known) / len(known) if known else 0.0
        for position, hit in known:
            self.above[position] = self.above.get(position, 0.0) + hit - own
            self.count[position] += 1
            self.right += hit

    def accuracies(self) -> dict[int, float]:
        """Accuracies by position, adjusted for the questions; positions with too few presentations are left out.

        Clamped, since a mean plus an effect can slightly exceed [0, 1] if a position is always right, or never.
        """
        mean = self.right / max(1, self.count.total())
        return {
            position: min(1.0, max(0.0, mean + self.above[position] / self.count[position]))
            for position in sorted(self.count)
            if self.count[position] >= LEAST_OF_PLACE
        }


@dataclass(frozen=True)
class Ability:
    """Accuracies: ``blind``: without a caption; ``by_control``: from captions that state the answers; ``places``: the
    best control's, by position of the right option.
    """

    blind: float
    by_control: Mapping[str, float]
    places: Mapping[int, float]

    @property
    def best(self) -> str:
        return max(self.by_control, key=lambda name: self.by_control[name])

    @property
    def gain(self) -> float:
        return self.by_control[self.best] - self.blind

    @property
    def accuracies(self) -> dict[str, float]:
        return {**self.by_control, BLIND: self.blind}

    def line(self) -> str:
        """All accuracies, for the terminal."""
        accuracies = ", ".join(f"{name} {value:.3f}" for name, value in self.accuracies.items())
        by_place = f"; {self.best} by place of the right option: {_by_place(self.places)}" if self.places else ""
        return accuracies + by_place


def cautions(ability: Ability) -> list[Caution]:
    """Warnings about a reader; none for a good one."""
    warnings = []
    if ability.gain < LEAST_GAIN:
        means = ", ".join(f"{name} {value:.3f}" for name, value in ability.by_control.items())
        advice = (
            "screen the questions, which it answers without any caption"
            if ability.blind > 1 - LEAST_GAIN
            else "take a more capable reader"
        )
        text = (
            f"the reader does not find in captions what they tell: {means}, blind {ability.blind:.3f}, so the best "
            f"caption gains {ability.gain:+.3f} over none, less than {LEAST_GAIN:.2f} (self-oracle: each question "
            f"followed by its right option); {advice}"
        )
        warnings.append(Caution("cannot_read", text, {**ability.accuracies, "threshold": LEAST_GAIN}))
    apart = max(ability.places.values()) - min(ability.places.values()) if ability.places else 0.0
    if apart > MOST_APART:
        text = (
            f"the reader prefers some places: accuracy from {ability.best} captions by place of the right option "
            f"ranges over {apart:.3f}, more than {MOST_APART:.2f} ({_by_place(ability.places)}); put every question "
            "in all orders, or take another reader"
        )
        by_letter = {LETTERS[position]: value for position, value in ability.places.items()}
        warnings.append(Caution("prefers_places", text, {**by_letter, "threshold": MOST_APART}))
    return warnings


def _by_place(places: Mapping[int, float]) -> str:
    return ", ".join(f"{LETTERS[position]} {value:.3f}" for position, value in places.items())


async def ability_of(reader: QuizReader, examples: Sequence[Example]) -> Ability | None:
    """A reader's ability on the examples' questions; None if nothing could be scored. Raises EngineDead."""
    blind, _ = await _read(reader, [(example, None) for example in examples])
    readings = {SELF_ORACLE: await _read(reader, [(example, self_oracle(example.questions)) for example in examples])}
    known = [
        (example, dense_caption(example.scene, Random(example.uid)))
        for example in examples
        if example.scene is not None
    ]
    if known:
        readings[ORACLE] = await _read(reader, known)
    means = {name: mean for name, (mean, _) in readings.items() if mean is not None}
    if blind is None or not means:
        return None
    best = max(means, key=lambda name: means[name])
    return Ability(blind, means, readings[best][1].accuracies())


async def _read(
    reader: QuizReader, captions: Sequence[tuple[Example, str | None]]
) -> tuple[float | None, PositionCounts]:
    """Mean accuracy over questions, and counts by position."""
    read = await asyncio.gather(*(reader.read(caption, example.questions) for example, caption in captions))
    readings = [reading for of_caption in read for reading in of_caption]
    places = PositionCounts()
    for reading in readings:
        places.add(*_hits(reader, reading))
    known = [reading.accuracy for reading in readings if reading.accuracy is not None]
    return (sum(known) / len(known) if known else None), places


def _hits(reader: QuizReader, reading: Reading) -> tuple[list[int], list[bool | None]]:
    answer = reading.question.answer
    places = [order.index(answer) for order in reader.orders(reading.question)]
    return places, [None if chosen is None else chosen == answer for chosen in reading.chosen]
