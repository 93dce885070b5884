"""What becomes of a row: a column a question, null with a reason, and which rows are to be asked again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.manifests.schema import USAGE
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import ChoiceRequest, EngineDead, Refused, RequestError
from capipe.models.yes_no import YesNoConfig, YesNoReader, prompt_of, sigmoid
from capipe.pipeline.commands.options.shared import validated
from capipe.stages.ask.asker import AskConfig, Asker, passed_on
from capipe.stages.ask.questions import parse_questions

from ...scripted import IMAGE, Scores, Scripted, options_of

ROW = Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg")
ASKED = ["star=Is there a star?", "text=Is there a text?"]


def answers(**outcomes: float | Exception | None) -> Scripted:
    """An engine with these log-odds of yes, by a word of the question; None: it says something else."""

    def choose(request: ChoiceRequest) -> Scores | Exception:
        outcome = next(value for word, value in outcomes.items() if f"a {word}?" in request.prompt.text)
        if outcome is None or isinstance(outcome, Exception):
            return outcome or [-9.0, -9.0]
        yes = request.choices.index(options_of(request.prompt)["Yes"])
        odds = [outcome if place == yes else 0.0 for place in range(2)]
        total = math.log(sum(map(math.exp, odds)))
        return [value - total for value in odds]

    return Scripted(choose)


async def asked(engine: Scripted, options: list[str] = ASKED, row: Row = ROW, **reader: Any) -> dict[str, Any]:
    config = AskConfig(questions=parse_questions(options), reader=YesNoConfig(**reader))
    return await Asker(YesNoReader(engine, config.reader), config).ask(row, IMAGE)


async def test_a_probability_a_question() -> None:
    engine = answers(star=2.0, text=-1.0)
    row = await asked(engine)
    assert row == {**passed_on(ROW), "ask_star": pytest.approx(sigmoid(2.0)), "ask_text": pytest.approx(sigmoid(-1.0))}
    assert len(engine.choices) == 4 and all(request.prompt.image is IMAGE for request in engine.choices)
    note = Row(0, "k", IMAGE.uid, Status.OK, "a note of ingest", b"image", "jpg")
    assert (await asked(answers(star=1.0), ASKED[:1], note))["error"] == "a note of ingest"


async def test_an_equal_question_is_asked_once_for_both_its_names() -> None:
    engine = answers(star=1.0)
    row = await asked(engine, ["one=Is there a star?", "two=Is there a star?"])
    assert len(engine.choices) == 2 and row["ask_one"] == row["ask_two"]


async def test_a_failed_request_makes_a_row_that_is_to_be_retried() -> None:
    row = await asked(answers(star=2.0, text=RequestError("connection reset")))
    assert (row["status"], row["error"]) == ("engine_error", "text: connection reset")
    assert row["ask_star"] is not None and row["ask_text"] is None
    both = await asked(answers(star=RequestError("busy"), text=RequestError("busy")))
    assert (both["status"], both["error"]) == ("engine_error", "busy")


async def test_a_question_without_an_answer_is_null_in_a_row_that_is_ok() -> None:
    row = await asked(answers(star=2.0, text=None))
    assert row["status"] == "ok" and row["ask_text"] is None and row["ask_star"] is not None
    assert row["error"].startswith("text: letters with a probability of ")
    refused = await asked(answers(star=2.0, text=Refused("I cannot help")))
    assert (refused["status"], refused["error"], refused["ask_text"]) == ("ok", "text: I cannot help", None)


async def test_a_row_without_any_answer_is_refused_or_to_be_retried() -> None:
    refused = await asked(answers(star=None, text=Refused("no")))
    assert refused["status"] == "refused" and refused["error"].startswith("no question could be scored: star: letters")
    silent = await asked(answers(star=None, text=None))
    assert silent["status"] == "engine_error" and silent["ask_star"] is silent["ask_text"] is None
    assert silent["error"].startswith("no question could be scored: letters with")


async def test_a_dead_engine_is_no_answer() -> None:
    with pytest.raises(EngineDead):
        await asked(answers(star=EngineDead("gone"), text=1.0))


async def test_sampled_answers_depend_on_image_question_and_seed_alone() -> None:
    """Servers without log-probabilities: the share of yes, from seeds that are each image's and question's own."""

    def says(request: Any) -> str:
        return options_of(request.prompt)["Yes" if request.sampling.seed % 3 else "No"]

    def seeds(engine: Scripted) -> list[int]:
        return [request.sampling.seed for request in engine.generations]

    one, again, other = (Scripted(generate=says) for _ in range(3))
    rows = [await asked(engine, mode="sampled", samples=4) for engine in (one, again)]
    assert rows[0] == rows[1] and seeds(one) == seeds(again) and len(set(seeds(one))) == 16
    assert 0 < rows[0]["ask_star"] < 1
    await asked(other, mode="sampled", samples=4, seed=1)
    assert not set(seeds(other)) & set(seeds(one))
    config = YesNoConfig(mode="sampled", samples=4)
    elsewhere = Scripted(generate=says)
    image = type(IMAGE)("v" * 32)
    await YesNoReader(elsewhere, config).ask(image, ["Is there a star?"])
    assert not set(seeds(elsewhere)) & set(seeds(one)), "another image's answers are drawn by other seeds"


def test_names_wordings_and_the_instruction_are_in_the_fingerprint() -> None:
    def semantic(*options: str, **reader: Any) -> dict[str, Any]:
        return AskConfig(questions=parse_questions(options), reader=YesNoConfig(**reader)).semantic()

    one = semantic("star=Is there a star?")
    assert one["questions"] == {"star": "Is there a star?"} and "letter of one option" in one["instruction"]
    assert semantic("star=Is there a big star?") != one != semantic("moon=Is there a star?")
    assert semantic("star=Is there a star?", orders=1) != one != semantic("star=Is there a star?", mode="sampled")


def test_rooms_requests_and_columns() -> None:
    config = AskConfig(questions=parse_questions(ASKED), reader=YesNoConfig())
    assert config.schema.names == [
        "key",
        "uid",
        "status",
        "error",
        "ask_star",
        "ask_text",
        *(field.name for field in USAGE),
    ]
    assert {str(config.schema.field(name).type) for name in ("ask_star", "ask_text")} == {"float"}
    assert config.requests == 4
    sampled = AskConfig(questions=config.questions, reader=YesNoConfig(mode="sampled", samples=3, orders=1))
    assert sampled.requests == 6
    assert config.room > len(prompt_of(IMAGE, "Is there a star?", (0, 1)).text)
    with pytest.raises(BadInput, match="temperature must be 0"):
        validated(AskConfig, questions=config.questions, reader=YesNoConfig(temperature=math.inf))
