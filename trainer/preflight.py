"""Before training: a caption that says nothing must earn what a guess earns, or a template will win.

And one that tells the answers must earn more, or the reader cannot read and the reward is noise. Of a quiz it is known
what a guess earns: training is refused where a template earns more. Of other rewards it is said what templates earn,
and warned where that is more than the first captions of the policy do.
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
from .rewards.quiz import QuizReward

GENERIC = "The image shows several objects on a plain background."
TOLERANCE = 0.1  # of accuracy above that of a reader without any caption
IMAGES = 64
OF_THE_IMAGE = ("judge", "clip", "blip", "itm", "reconstruction")  # what a caption of any image should not win


@dataclass(frozen=True)
class Floors:
    """Mean rewards of captions that fit any image, and of none."""

    generic: float
    empty: float
    blind: float


async def floors(reward: QuizReward, tasks: Sequence[Example]) -> Floors:
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


async def ability(reader: QuizReader, tasks: Sequence[Example]) -> Ability:
    """What the reader makes of captions that tell the answers. Raises BadInput where nothing could be scored."""
    found = await ability_of(reader, tasks[:IMAGES])
    if found is None:
        raise BadInput("preflight: the reader scored none of the questions; is it a model that answers with letters?")
    return found


def refuse_reader(found: Ability, name: str) -> list[str]:
    """Warnings about a reader that is to reward. Raises BadInput where it cannot read: then the reward is noise."""
    wrong = cautions(found)
    for each in wrong:
        if each.kind == "cannot_read":
            raise BadInput(f"preflight: {name}: {each.text}; set the quiz's `reader` in the recipe")
    return [f"warning: {name}: {each.text}" for each in wrong]


@dataclass(frozen=True)
class Control:
    """Mean rewards by name of a caption that fits any image, of none, and of true ones where the images are rendered.

    Names that could not be scored are left out.
    """

    generic: dict[str, float]
    empty: dict[str, float]
    true: dict[str, float]

    def lines(self) -> list[str]:
        """A line for each reward."""
        told = []
        for name in dict.fromkeys([*self.generic, *self.empty, *self.true]):
            means = {"generic": self.generic, "empty": self.empty, "true": self.true}
            known = [f"{control} {found[name]:.3f}" for control, found in means.items() if name in found]
            told.append(f"preflight: {name}: {', '.join(known)}")
        return told


async def controls(judge: RewardManager, tasks: Sequence[Example], ids: Callable[[str], list[int]]) -> Control:
    """What a judge's rewards, its quiz apart, say of controls on the first images. ``ids``: the policy's, of a text."""
    apart = RewardManager({name: each for name, each in judge.rewards.items() if name != "quiz"}, judge.parts)
    first = tasks[:IMAGES]
    truth = [(task, dense_caption(task.scene, Random(task.uid))) for task in first if task.scene is not None]

    async def means(captions: Sequence[tuple[Example, str]]) -> dict[str, float]:
        found = await asyncio.gather(
            *(apart.score(task, completion(text, ids), f"preflight/{task.uid}") for task, text in captions)
        )
        known = {name: [value for each in found if (value := each[name].value) is not None] for name in apart.rewards}
        return {name: sum(values) / len(values) for name, values in known.items() if values}

    return Control(
        await means([(task, GENERIC) for task in first]),
        await means([(task, "") for task in first]),
        await means(truth),
    )


def completion(text: str, ids: Callable[[str], list[int]]) -> Completion:
    """A text as if the policy had written it."""
    tokens = tuple(ids(text))
    return Completion(text, tokens, "stop", len(tokens))


def template_warnings(generic: Mapping[str, float], figures: Mapping[str, float]) -> list[str]:
    """Where a caption of any image earned more than the first step's captions did (``reward/NAME`` of ``figures``)."""
    return [
        f"warning: {name}: a generic caption earns {generic[name]:.3f}, the first step's captions {mean:.3f}: training "
        "may find that template; mind what the captions become"
        for name in OF_THE_IMAGE
        if name in generic and (mean := figures.get(f"reward/{name}")) is not None and generic[name] > mean
    ]
