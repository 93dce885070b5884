"""Sentences that are not true cost, each where it ends; silence does not pay; what has no answer is not charged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from capipe.models.bundled import folder_of
from capipe.models.engines.base import ChoiceRequest, Completion, EngineDead, RequestError
from capipe.models.engines.prompting import PromptEncoder
from capipe.models.tiny.train.texts.hard_negatives import plant_addition
from capipe.models.tiny.world.corpus import samples
from capipe.models.yes_no import sigmoid
from capipe.trainer.dataset import Example
from capipe.trainer.rewards.base import RewardContext
from capipe.trainer.rewards.kinds import BUILT_IN
from capipe.trainer.rewards.verified import (
    VerifiedReward,
    VerifiedRewardConfig,
    build_verified_reward,
    lacking_sentences,
    penalties,
    penalty,
    size_of,
)

from ...oracle.scene_engine import SceneEngine
from ...scripted import Scripted, options_of
from .test_judge import examples, jpeg

TRUE, FALSE = 3.0, -3.0  # log-odds


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    from transformers import AutoTokenizer

    return PromptEncoder(AutoTokenizer.from_pretrained(folder_of("captioner")), None)


@pytest.fixture
def example(tmp_path: Path) -> Example:
    (only,) = examples(tmp_path / "a.tar", one=jpeg("red"))
    return only


def config(**settings: Any) -> VerifiedRewardConfig:
    return VerifiedRewardConfig(model="any", **settings)


def believes(odds: Callable[[str], float | Exception]) -> Scripted:
    """An engine with log-odds by the text of its prompt."""

    def scores(request: ChoiceRequest) -> list[float] | Exception:
        value = odds(request.prompt.text)
        if isinstance(value, Exception):
            return value
        yes = options_of(request.prompt)["Yes"]
        return [min(0.0, value) if letter == yes else min(0.0, -value) for letter in request.choices]

    return Scripted(scores)


def of_words(text: str) -> float:
    """What mentions a unicorn is not true."""
    return FALSE if "unicorn" in text else TRUE


@pytest.fixture
async def made(encoder: PromptEncoder) -> AsyncIterator[Callable[..., VerifiedReward]]:
    rewards: list[VerifiedReward] = []

    def make(engine: Any, **settings: Any) -> VerifiedReward:
        rewards.append(VerifiedReward(engine, config(**settings), encoder.decode))
        return rewards[-1]

    yield make
    for reward in rewards:
        await reward.aclose()


def written(encoder: PromptEncoder, text: str) -> Completion:
    ids = encoder.text_ids(text)
    return Completion(text, tuple(ids), "stop", len(ids))


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("hinge", {0.0: 1.0, 0.25: 0.5, 0.5: 0.0, 1.0: 0.0}),
        ("step", {0.0: 1.0, 0.499: 1.0, 0.5: 0.0, 1.0: 0.0}),
        ("linear", {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
    ],
)
def test_penalties_fall_from_one_to_nothing(kind: Any, at: dict[float, float]) -> None:
    asked = config(penalty=kind)
    assert {value: penalty(value, asked) for value in at} == pytest.approx(at)
    assert penalty(0.5, config(threshold=0.8)) == pytest.approx(0.375)


def test_a_long_sentence_costs_as_much_as_its_claims_in_several() -> None:
    clause = "a small red unicorn is in the left corner"
    short, long = f"{clause}.", f"{clause}, {clause}, {clause} and {clause}."
    asked = config(words=9)
    assert size_of(short, 9) == 1 and size_of("A unicorn.", 9) == 1 and size_of(long, 9) > 4
    assert penalties([long], [0.0], asked)[0] > sum(penalties([short] * 4, [0.0] * 4, asked)) - 1e-9
    assert penalties([short, short], [0.0, None], asked) == [1.0, 0.0]


def test_silence_is_better_than_a_lie_and_worse_than_the_truth() -> None:
    asked = config(least=3)

    def value(*probabilities: float) -> float:
        sentences = [f"Sentence {number}." for number in range(len(probabilities))]
        charged = penalties(sentences, list(probabilities), asked)
        return -sum(charged) - asked.missing * lacking_sentences(sentences, asked)

    assert value() == -1.5 and value(1.0) == -1.0 and value(0.0) == -2.0
    assert value(0.0) < value() < value(1.0) < value(1.0, 1.0) < value(1.0, 1.0, 1.0) == value(*[1.0] * 9) == 0
    assert value(*[1.0] * 9, 0.0) == -1 and value(*[1.0] * 9, 0.0, 0.0) == -2, "a sum: the true ones buy nothing"
    assert lacking_sentences(["A dog.", "a  dog", "A dog."], asked) == 2, "one sentence, however often it is said"
    assert lacking_sentences([], config(least=0)) == 0


@pytest.mark.parametrize("settings", [{"normalise": True}, {"threshold": 0}, {"missing": 2}, {"words": 0}, {"x": 1}])
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        config(**settings)


# --- captions --------------------------------------------------------------------------------------------------------


async def test_each_wrong_sentence_is_charged_to_the_token_that_ends_it(
    encoder: PromptEncoder, example: Example, made: Callable[..., VerifiedReward]
) -> None:
    text = "A red star is here. A unicorn is there. The background is white. Another unicorn sleeps."
    caption = written(encoder, text)
    scored = await made(believes(of_words)).score(example, caption, "d")
    cost = penalty(sigmoid(FALSE), config())
    assert scored.value == pytest.approx(-2 * cost, abs=1e-3)
    assert (scored.details["sentences"], scored.details["wrong"], scored.details["lacking"]) == (4, 2, 0)
    charged = [place for place, value in enumerate(scored.per_token) if value]
    before = [encoder.decode(list(caption.token_ids[: place + 1])) for place in charged]
    assert [piece.strip() for piece in before] == [text[: text.index("The") - 1], text]
    assert sum(scored.per_token) == pytest.approx(scored.value)


async def test_what_a_caption_lacks_is_no_tokens_fault(
    encoder: PromptEncoder, example: Example, made: Callable[..., VerifiedReward]
) -> None:
    reward = made(believes(of_words), least=3.0, missing=0.5)
    one = await reward.score(example, written(encoder, "A star."), "d")
    assert one.value == pytest.approx(-1.0) and set(one.per_token) == {0.0}
    nothing = await reward.score(example, written(encoder, ""), "d")
    assert nothing.value == pytest.approx(-1.5) and nothing.details["sentences"] == 0
    served = Completion("A unicorn. A star. A cross.", (), "stop", 9)
    assert (await reward.score(example, served, "d")).per_token == (), "a server reports no token ids"


async def test_a_sentence_is_asked_about_once_for_an_image_and_again_if_the_request_failed(
    encoder: PromptEncoder, example: Example, made: Callable[..., VerifiedReward]
) -> None:
    failing = True

    def odds(text: str) -> float | Exception:
        return RequestError("reset") if failing and "unicorn" in text else TRUE

    engine = believes(odds)
    reward = made(engine, least_scored=0.9)
    captions = [written(encoder, text) for text in ("A star. A unicorn.", "A unicorn. A star.", "A star.")]
    scored = await asyncio.gather(*(reward.score(example, each, f"{n}") for n, each in enumerate(captions)))
    assert [each.value is None for each in scored] == [True, True, False]
    assert scored[0].details["error"] == "reset" and len(engine.choices) == 4
    failing = False
    again = await reward.score(example, captions[0], "d")
    assert again.value == pytest.approx(-0.5) and len(engine.choices) == 6
    lenient = made(believes(lambda text: RequestError("no") if "unicorn" in text else TRUE), least=0)
    half = await lenient.score(example, captions[0], "d")
    assert half.value == 0 and half.details["probabilities"][1] is None, "half of the answers are enough by default"


async def test_a_dead_engine_ends_the_run(
    encoder: PromptEncoder, example: Example, made: Callable[..., VerifiedReward]
) -> None:
    reward = made(believes(lambda text: EngineDead("gone")))
    with pytest.raises(EngineDead):
        await reward.score(example, written(encoder, "A star. A cross."), "d")


async def test_true_captions_beat_wrong_and_empty_ones_by_who_knows_the_scene(
    tmp_path: Path, encoder: PromptEncoder, made: Callable[..., VerifiedReward]
) -> None:
    rendered = list(samples(8, "heldout", seed=9))
    plain = examples(tmp_path / "b.tar", **{f"n{number}": sample.image for number, sample in enumerate(rendered)})
    scenes = {each.uid: sample.scene for each, sample in zip(plain, rendered, strict=True)}
    reward = made(SceneEngine(scenes), least=0)
    for number, each in enumerate(plain):
        planted = plant_addition(scenes[each.uid], Random(number))
        true, wrong, generic = [
            (await reward.score(each, written(encoder, text), "d")).value
            for text in (planted.original, planted.text, "Several things on a plain background.")
        ]
        assert true is not None and wrong is not None and generic is not None
        assert true - wrong == pytest.approx(penalty(0.05, config()), abs=0.1) and generic < true


# --- the model -------------------------------------------------------------------------------------------------------


async def test_room_is_what_the_largest_image_and_the_question_leave(made: Callable[..., VerifiedReward]) -> None:
    engine = believes(of_words)
    assert await made(engine).room() is None
    engine.context = 400
    room = await made(engine).room()
    assert room is not None and 300 < room < 400
    sampled = await made(engine, mode="sampled").room()
    assert sampled == room - 3


async def test_a_bundled_model_checks_sentences(encoder: PromptEncoder, tmp_path: Path) -> None:
    """Shapes alone: how well it does is measured in bench/."""
    (sample,) = samples(1, "heldout", seed=4)
    (each,) = examples(tmp_path / "c.tar", one=sample.image)
    asked = VerifiedRewardConfig(model="tiny/teacher", engine="transformers", least=2)
    reward = await build_verified_reward(asked, RewardContext(encoder.decode, 60))
    try:
        scored = await reward.score(each, written(encoder, "There is a star. There is a circle."), "d")
    finally:
        await reward.aclose()
    assert len(scored.details["probabilities"]) == 2
    if scored.value is None:  # it named no letter
        assert "letters with a probability" in scored.details["error"]
    else:
        assert -2 <= scored.value <= 0 and len(scored.per_token) > 2


def test_it_is_a_kind_of_reward_that_a_generic_caption_must_not_win() -> None:
    assert BUILT_IN["verified"].of_image and VerifiedReward.metrics == ("sentences", "wrong", "lacking")
