"""Before training: a caption that says nothing must earn what a guess earns, or a template will win."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BadInput
from .quiz_reward import QuizReward
from .tasks import Task

GENERIC = "The image shows several objects on a plain background."
TOLERANCE = 0.1  # of accuracy above that of a reader without any caption
IMAGES = 64


@dataclass(frozen=True)
class Floors:
    """Mean rewards of captions that fit any image, and of none."""

    generic: float
    empty: float
    blind: float


async def floors(reward: QuizReward, tasks: Sequence[Task]) -> Floors:
    """The quiz reward of three controls over the first images. Raises BadInput where nothing could be scored."""
    means = []
    for text in (GENERIC, "", None):
        scored = await asyncio.gather(
            *(reward.score_text(task, text, f"preflight/{task.uid}") for task in tasks[:IMAGES])
        )
        known = [each.value for each in scored if each.value is not None]
        if not known:
            raise BadInput(
                "preflight: the reader scored none of the questions; is it a model that answers with letters?"
            )
        means.append(sum(known) / len(known))
    return Floors(*means)


def refuse_templates(found: Floors, tolerance: float = TOLERANCE) -> None:
    """Raise BadInput where a template earns more than a guess."""
    for name, value in (("generic", found.generic), ("empty", found.empty)):
        if value > found.blind + tolerance:
            raise BadInput(
                f"preflight: a {name} caption earns {value:.2f}, the reader alone {found.blind:.2f}: training would "
                "find that template; screen the questions more strictly, or take another reader"
            )
