"""Rewards: what each says of a caption, and how several are put together without one failure becoming a zero."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from capipe.models.engines.base import ChoiceRequest, Completion, EngineDead, RequestError
from capipe.models.quiz import ABSENT, Question
from capipe.models.reader import QuizReader, ReaderConfig
from capipe.trainer.advantages import RewardTerm
from capipe.trainer.dataset import Example
from capipe.trainer.preflight import Floors, floors, refuse_templates
from capipe.trainer.rewards.base import Reward, RewardManager, Scored
from capipe.trainer.rewards.quiz import QuizReward, QuizRewardConfig, reader_config
from capipe.trainer.rewards.text import (
    BoilerplateConfig,
    BoilerplateReward,
    LengthConfig,
    RepetitionReward,
    length_value,
)

from ...scripted import Scripted, knows

COLOR = Question("Which color is the star?", ("red", "blue", "green"), 0, "color")
COUNT = Question("How many shapes are there?", ("one", "two"), 1, "count")
TASK = Example("u" * 32, "k", "memory://x.tar", 0, 1, (COLOR, COUNT))


def caption(text: str, tokens: int = 5) -> Completion:
    return Completion(text, tuple(range(tokens)), "stop", tokens)


def reads(request: ChoiceRequest) -> list[float]:
    """Finds the words of the caption among the options; without any it abstains."""
    told = (
        request.prompt.text.split("<caption>")[-1].split("</caption>")[0] if "<caption>" in request.prompt.text else ""
    )
    return knows(request, *told.split())


def quiz(**settings: Any) -> tuple[QuizReward, Scripted]:
    engine = Scripted(choose=reads)
    return QuizReward(QuizReader(engine, ReaderConfig()), QuizRewardConfig(**settings)), engine


async def test_the_quiz_pays_for_what_can_be_read() -> None:
    reward, engine = quiz()
    assert (await reward.score(TASK, caption("a red star"), "d")).value == pytest.approx(4 / 7)
    assert len(engine.choices) == 4 + 3  # every question in every cyclic order, the abstain option among them
    assert (await reward.score(TASK, caption("two shapes: red"), "d")).value == 1
    assert (await reward.score(TASK, caption("a blue star"), "d")).value == 0
    assert (await reward.score(TASK, caption("nothing"), "d")).value == 0


async def test_questions_are_drawn_with_replacement_and_shuffled_as_in_the_paper() -> None:
    reward, engine = quiz(presentations="sampled", questions=50)
    scored = await reward.score(TASK, caption("a red star"), "one")
    asked = Counter(scored.details["asked"])
    assert sum(asked.values()) == len(engine.choices) == 50 and set(asked) == {COLOR.id, COUNT.id}
    orders = {order for question, order in reward.presentations(TASK, "one") if question is COLOR}
    assert len(orders) > 4  # not the cyclic ones alone
    assert reward.presentations(TASK, "one") == reward.presentations(TASK, "one") != reward.presentations(TASK, "two")


async def test_caprls_prompt_shuffles_all_options_but_the_last() -> None:
    config = QuizRewardConfig(presentations="sampled", questions=50, reader_prompt="caprl")
    reward = QuizReward(QuizReader(Scripted(choose=reads), reader_config(config)), config)
    asked = reward.presentations(TASK, "one")
    assert all(order[-1] == len(question.options) for question, order in asked)
    assert len({order for question, order in asked if question is COLOR}) == math.factorial(len(COLOR.options))
    assert "reader_prompt" not in QuizRewardConfig().model_dump() and config.model_dump()["reader_prompt"] == "caprl"


async def test_fewer_questions_are_drawn_anew_for_each_caption() -> None:
    reward, _ = quiz(questions=1)
    seen = {(await reward.score(TASK, caption("red"), f"{n}")).details["asked"][0] for n in range(12)}
    assert seen == {COLOR.id, COUNT.id}


async def test_what_could_not_be_scored_is_none_and_never_zero() -> None:
    failing = Scripted(choose=lambda request: RequestError("too long"))
    reward = QuizReward(QuizReader(failing, ReaderConfig()), QuizRewardConfig())
    scored = await reward.score(TASK, caption("red"), "d")
    assert scored.value is None and scored.details["errors"] == ["too long"]

    def half(request: ChoiceRequest) -> list[float] | RequestError:
        return reads(request) if "color" in request.prompt.text else RequestError("no")

    partly = QuizReward(QuizReader(Scripted(choose=half), ReaderConfig()), QuizRewardConfig(least_scored=0.5))
    assert (await partly.score(TASK, caption("red"), "d")).value == 1  # 4 of 7 answers, all right
    strict = QuizReward(partly.reader, QuizRewardConfig(least_scored=0.9))
    assert (await strict.score(TASK, caption("red"), "d")).value is None


class Fixed:
    """Values in turn; an exception is raised."""

    def __init__(self, *values: float | Exception | None) -> None:
        self.values = list(values)

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        value = self.values.pop(0)
        if isinstance(value, Exception):
            raise value
        return Scored(value)

    async def aclose(self) -> None: ...


async def results(rewards: dict[str, Reward], parts: dict[str, RewardTerm], count: int) -> list[Any]:
    judge = RewardManager(rewards, parts)
    return judge.results([await judge.score(TASK, caption("x"), f"{n}") for n in range(count)])


async def test_a_reward_that_fails_for_a_caption_leaves_it_unscored() -> None:
    rewards: dict[str, Reward] = {"quiz": Fixed(1.0, ValueError("boom"), 0.5), "length": Fixed(1.0, 1.0, None)}
    found = await results(rewards, {"quiz": RewardTerm(), "length": RewardTerm(0.2)}, 3)
    assert [each.score for each in found] == [1.2, None, None]
    assert found[1].components == {"quiz": None, "length": 1.0}
    assert found[1].details["quiz"] == {"error": "ValueError: boom"}


async def test_a_dead_engine_ends_the_run() -> None:
    with pytest.raises(EngineDead):
        await results({"quiz": Fixed(EngineDead("gone"))}, {"quiz": RewardTerm()}, 1)


async def test_parts_are_normalised_within_the_group() -> None:
    rewards: dict[str, Reward] = {"quiz": Fixed(0.0, 1.0), "length": Fixed(100.0, 300.0)}
    found = await results(rewards, {"quiz": RewardTerm(1.0, True), "length": RewardTerm(1.0, True)}, 2)
    assert found[0].score == pytest.approx(-found[1].score) and found[1].score == pytest.approx(2 * 0.7071, rel=1e-3)


def test_the_length_hinge() -> None:
    hinge = LengthConfig(free=10, most=20)
    assert [length_value(n, hinge) for n in (1, 10, 15, 20, 99)] == [1, 1, 0.5, 0, 0]
    longer = LengthConfig(shape="longer", most=20)
    assert [length_value(n, longer) for n in (0, 10, 20, 99)] == [0, 0.5, 1, 1]


async def test_repetition_and_boilerplate_cost() -> None:
    loop = caption("a red star and " * 5)
    assert (await RepetitionReward().score(TASK, loop, "d")).value == pytest.approx(-13 / 17)
    assert (await RepetitionReward().score(TASK, caption("a red star and a blue one"), "d")).value == 0
    reward = BoilerplateReward(BoilerplateConfig())
    scored = await reward.score(TASK, caption("Sure, here is a star. In summary, here is a star."), "d")
    assert scored.value == -4 and scored.details["phrases"] == {"here is a": 2, "sure,": 1, "in summary": 1}
    assert (await reward.score(TASK, caption("There is an object."), "d")).value == 0


async def test_preflight_refuses_what_a_template_can_win() -> None:
    reward, _ = quiz()
    found = await floors(reward, [TASK])
    assert found == Floors(0, 0, 0)
    refuse_templates(found)
    gullible = Scripted(
        choose=lambda request: knows(request, "red") if "<caption>" in request.prompt.text else reads(request)
    )
    paid = await floors(QuizReward(QuizReader(gullible, ReaderConfig()), QuizRewardConfig()), [TASK])
    assert paid.generic == pytest.approx(4 / 7) and paid.blind == 0
    with pytest.raises(Exception, match=r"generic caption earns 0\.57.*screen the questions"):
        refuse_templates(paid)


async def test_a_caption_that_does_not_mention_an_absent_thing_is_right_about_it() -> None:
    dog = Question("Is there a dog in the image?", ("Yes", "No"), 1, ABSENT)
    task = Example("u" * 32, "k", "memory://x.tar", 0, 1, (dog,))

    def believes(request: ChoiceRequest) -> list[float]:
        text = request.prompt.text.partition("<caption>")[2].partition("</caption>")[0]
        return knows(request, *(["Yes"] if "a dog" in text else ["No"] if "no dog" in text else []))

    values = {}
    for rule in ("unsaid", "answered"):
        reward = QuizReward(QuizReader(Scripted(choose=believes), ReaderConfig()), QuizRewardConfig(absent=rule))  # type: ignore[arg-type]
        values[rule] = [
            (await reward.score(task, caption(text), "d")).value for text in ("There is a dog.", "a cat", "no dog")
        ]
    assert values == {"unsaid": [0, 1, 1], "answered": [0, 0, 1]}
    assert "absent" not in QuizRewardConfig().model_dump(), "runs of before keep their fingerprint"
