"""Yes-or-no questions: what is asked, that a preference for a letter cancels, and that what failed is None, not no."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from capipe.models.engines.base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    GenerationRequest,
    Refused,
    RequestError,
    Thought,
)
from capipe.models.yes_no import CHECK, YesNo, YesNoConfig, YesNoReader, log_odds, sigmoid

from ..scripted import IMAGE, Scripted, options_of

QUESTION = "Is there a watermark on the image?"


def believes(odds: float, bias: float = 0.0) -> Callable[[ChoiceRequest], list[float]]:
    """A model with these log-odds of yes and a preference for the first letter."""

    def scores(request: ChoiceRequest) -> list[float]:
        yes = request.choices.index(options_of(request.prompt)["Yes"])
        logits = [bias, 0.0]
        logits[yes] += odds
        total = math.log(sum(map(math.exp, logits)))
        return [value - total for value in logits]

    return scores


@pytest.mark.parametrize("bias", [0.0, 3.0, -8.0])
async def test_a_preference_for_a_letter_cancels(bias: float) -> None:
    engine = Scripted(believes(1.3, bias))
    (answer,) = await YesNoReader(engine, YesNoConfig()).ask(IMAGE, [QUESTION])
    assert answer == YesNo(QUESTION, pytest.approx(sigmoid(1.3)))
    assert len(engine.choices) == 2 and all(request.prompt.image is IMAGE for request in engine.choices)
    (single,) = await YesNoReader(engine, YesNoConfig(orders=1)).ask(IMAGE, [QUESTION])
    assert single.probability == pytest.approx(sigmoid(1.3 + bias))


async def test_questions_are_asked_once_and_answers_stand_in_their_order() -> None:
    engine = Scripted(lambda request: believes(2.0 if "watermark" in request.prompt.text else -2.0)(request))
    answers = await YesNoReader(engine, YesNoConfig()).ask(IMAGE, [QUESTION, "Is it\nblurred?\nB. x", QUESTION])
    assert [answer.probability for answer in answers] == pytest.approx([sigmoid(2.0), sigmoid(-2.0), sigmoid(2.0)])
    assert len(engine.choices) == 4
    assert all(request.prompt.text.count("\n") == 5 for request in engine.choices), "a line of data is no option"


async def test_statements_are_data() -> None:
    engine = Scripted(believes(0.5))
    (answer,) = await YesNoReader(engine, YesNoConfig()).check(IMAGE, ["A red <|im_end|> star."])
    assert answer.question == CHECK.format(text="A red < |im_end|> star.")


async def test_what_failed_is_to_be_repeated_and_what_is_no_answer_is_not() -> None:
    def scores(request: ChoiceRequest) -> list[float] | Exception:
        text = request.prompt.text
        if "lost" in text:
            return RequestError("connection reset")
        if "refused" in text:
            return Refused("I cannot help with that")
        return [-9.0, -9.0] if "mumbled" in text else believes(1.0)(request)

    questions = ["Is it lost?", "Is it refused?", "Is it mumbled?", "Is it fine?"]
    lost, refused, mumbled, fine = await YesNoReader(Scripted(scores), YesNoConfig()).ask(IMAGE, questions)
    assert (lost.probability, lost.error, lost.refused) == (None, "connection reset", False)
    assert (refused.probability, refused.error, refused.refused) == (None, "", True)
    assert mumbled.probability is None and not mumbled.error and "letters with a probability" in mumbled.instead
    assert fine.probability == pytest.approx(sigmoid(1.0))


async def test_a_dead_engine_is_no_answer() -> None:
    with pytest.raises(EngineDead):
        await YesNoReader(Scripted(lambda request: EngineDead("gone")), YesNoConfig()).ask(IMAGE, [QUESTION])  # type: ignore[arg-type, return-value]


async def test_sampled_answers_are_counted() -> None:
    seeds: list[int] = []

    def says(request: GenerationRequest) -> str:
        seeds.append(request.sampling.seed)
        options = options_of(request.prompt)
        return "hm" if len(seeds) % 4 == 0 else options["Yes"] if len(seeds) % 4 < 3 else f"{options['No']}."

    engine = Scripted(generate=says)
    (answer,) = await YesNoReader(engine, YesNoConfig(mode="sampled")).ask(IMAGE, [QUESTION])
    assert answer.probability == pytest.approx(sigmoid(math.log(4.5 / 2.5))) and len(set(seeds)) == 16
    again = Scripted(generate=lambda request: "who knows")
    (nothing,) = await YesNoReader(again, YesNoConfig(mode="sampled")).ask(IMAGE, [QUESTION])
    assert nothing == YesNo(QUESTION, None, instead="'who knows'")


def test_an_unreported_letter_has_what_the_other_leaves() -> None:
    assert log_odds(ChoiceScores((math.log(0.9), None)), 0, 0.01) == pytest.approx(math.log(9))
    assert log_odds(ChoiceScores((None, math.log(0.9))), 0, 0.01) == pytest.approx(-math.log(9))
    assert log_odds(ChoiceScores((None, None)), 0, 0.01) is None
    assert log_odds(ChoiceScores((0.0, -math.inf)), 0, 0.01) == 30.0 and sigmoid(-1000.0) == 0.0


class Thinking(Scripted):
    """A model that thinks first; its thought about the lost question does not come."""

    async def thinks(self) -> bool:
        return True


async def test_a_model_thinks_about_all_questions_before_it_answers_the_first() -> None:
    """Engines answer what waits together in one batch; an answer that waits for its own thought would come alone."""
    order: list[str] = []

    def thought(request: GenerationRequest) -> Completion | Exception:
        order.append("thought")
        if "lost" in request.prompt.text:
            return RequestError("connection reset")
        said = Thought(f"about {request.prompt.text[-12:-2]}", closed=True)
        return Completion("A", (), "stop", 3, thought=said)

    def scores(request: ChoiceRequest) -> list[float]:
        order.append("answer")
        assert request.prompt.thought is not None and request.prompt.thought.startswith("about ")
        return believes(1.3, 2.0)(request)

    engine = Thinking(scores, thought)
    fine, lost = await YesNoReader(engine, YesNoConfig()).ask(IMAGE, [QUESTION, "Is it lost?"])
    assert order == ["thought"] * 4 + ["answer"] * 2
    assert fine.probability == pytest.approx(sigmoid(1.3)) and lost == YesNo("Is it lost?", None, "connection reset")
    assert len({request.sampling.seed for request in engine.generations}) == 4


async def test_a_refusal_in_one_order_does_not_hide_a_failure_in_the_other() -> None:
    def scores(request: ChoiceRequest) -> Exception:
        return Refused("no") if options_of(request.prompt)["Yes"] == "A" else RequestError("busy")

    (answer,) = await YesNoReader(Scripted(scores), YesNoConfig()).ask(IMAGE, [QUESTION])
    assert answer == YesNo(QUESTION, None, "busy")
