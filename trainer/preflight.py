"""Checks before training: an uninformative caption must earn no more than a guess, or training would find a template.

A caption that states the answers must earn more, else the reader does not use captions and the reward is noise. For a
quiz the reward of a guess is measured, and training is refused if a template earns more. For other rewards the
templates' means are logged, with a warning if they exceed those of the policy's first captions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from ..errors import BadInput
from ..models.engines.base import Completion
from ..models.reader import QuizReader
from ..models.tiny.world.captions import dense_caption
from .dataset import Example
from .evaluation.ability import Ability, ability_of, cautions
from .rewards.base import RewardManager
from .rewards.kinds import BUILT_IN
from .rewards.quiz import QuizReward

GENERIC = "The image shows several objects on a plain background."
TOLERANCE = 0.1  # in accuracy, above a reader without any caption
IMAGES = 64
OF_IMAGE = [kind for kind, spec in BUILT_IN.items() if spec.of_image]  # rewards that a generic caption should not win


@dataclass(frozen=True)
class Floors:
    """Mean quiz rewards of a generic caption, an empty one, and no caption (blind)."""

    generic: float
    empty: float
    blind: float


async def floors(reward: QuizReward, examples: Sequence[Example]) -> Floors:
    """Quiz reward of three controls over the first images. Raises BadInput if nothing could be scored."""
    means = []
    for text in (GENERIC, "", None):
        scored = await asyncio.gather(
            *(reward.score_text(example, text, f"preflight/{example.uid}") for example in examples[:IMAGES])
        )
        known = [result.value for result in scored if result.value is not None]
        if not known:
            raise BadInput(
                "preflight: the reader scored none of the questions; is it a model that answers with letters?"
            )
        means.append(sum(known) / len(known))
    return Floors(*means)


def refuse_templates(measured: Floors, tolerance: float = TOLERANCE) -> None:
    """Raise BadInput if a template earns more than a guess."""
    for name, value in (("generic", measured.generic), ("empty", measured.empty)):
        if value > measured.blind + tolerance:
            raise BadInput(
                f"preflight: a {name} caption earns {value:.2f}, the reader alone {measured.blind:.2f}: training would "
                "find that template; screen the questions more strictly, or take another reader"
            )


async def ability(reader: QuizReader, examples: Sequence[Example]) -> Ability:
    """The reader's accuracy on captions that state the answers. Raises BadInput if nothing could be scored."""
    measured = await ability_of(reader, examples[:IMAGES])
    if measured is None:
        raise BadInput("preflight: the reader scored none of the questions; is it a model that answers with letters?")
    return measured


def refuse_reader(measured: Ability, name: str) -> list[str]:
    """Warnings about a reward's reader. Raises BadInput if it does not use captions: the reward would be noise."""
    warnings = cautions(measured)
    for caution in warnings:
        if caution.kind == "cannot_read":
            raise BadInput(f"preflight: {name}: {caution.text}; set the quiz's `reader` in the recipe")
    return [f"warning: {name}: {caution.text}" for caution in warnings]


@dataclass(frozen=True)
class Control:
    """Mean rewards, by name, of a generic caption, an empty one, and true ones (rendered images only).

    Rewards that could not be scored are left out.
    """

    generic: dict[str, float]
    empty: dict[str, float]
    true: dict[str, float]

    def lines(self) -> list[str]:
        """One line per reward."""
        lines = []
        for name in dict.fromkeys([*self.generic, *self.empty, *self.true]):
            means = {"generic": self.generic, "empty": self.empty, "true": self.true}
            known = [f"{control} {mean[name]:.3f}" for control, mean in means.items() if name in mean]
            lines.append(f"preflight: {name}: {', '.join(known)}")
        return lines


async def controls(rewards: RewardManager, examples: Sequence[Example], ids: Callable[[str], list[int]]) -> Control:
    """Controls on the first images, for all rewards except the quiz. ``ids``: text to the policy's token ids."""
    others = RewardManager({name: reward for name, reward in rewards.rewards.items() if name != "quiz"}, rewards.terms)
    first = examples[:IMAGES]
    true = [
        (example, dense_caption(example.scene, Random(example.uid))) for example in first if example.scene is not None
    ]

    async def means(captions: Sequence[tuple[Example, str]]) -> dict[str, float]:
        scores = await asyncio.gather(
            *(others.score(example, completion(text, ids), f"preflight/{example.uid}") for example, text in captions)
        )
        known = {
            name: [value for of_caption in scores if (value := of_caption[name].value) is not None]
            for name in others.rewards
        }
        return {name: sum(values) / len(values) for name, values in known.items() if values}

    return Control(
        await means([(example, GENERIC) for example in first]),
        await means([(example, "") for example in first]),
        await means(true),
    )


def completion(text: str, ids: Callable[[str], list[int]]) -> Completion:
    """A text as a completion of the policy."""
    tokens = tuple(ids(text))
    return Completion(text, tokens, "stop", len(tokens))


def template_warnings(generic: Mapping[str, float], metrics: Mapping[str, float]) -> list[str]:
    """Warnings for rewards with which a generic caption earned more than the first step's captions.

    ``metrics``: their means as ``reward/NAME``.
    """
    return [
        f"warning: {name}: a generic caption earns {generic[name]:.3f}, the first step's captions {mean:.3f}: training "
        "may find that template; mind what the captions become"
        for name in OF_IMAGE
        if name in generic and (mean := metrics.get(f"reward/{name}")) is not None and generic[name] > mean
    ]
