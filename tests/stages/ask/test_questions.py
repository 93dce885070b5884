"""Named questions: which there are, how one's own are written, and what is no question."""

from __future__ import annotations

import pytest

from capipe.errors import BadInput
from capipe.models.quiz import one_line
from capipe.stages.ask.questions import LONGEST, NAMED, NamedQuestion, parse_questions


def test_bundled_questions_are_one_line_that_yes_or_no_answers() -> None:
    topics = {"watermark", "screenshot", "text_only", "blurred", "collage", "synthetic", "rotated", "product_shot"}
    assert NAMED.keys() == topics and list(NAMED) == sorted(NAMED)
    for text in NAMED.values():
        assert text.endswith("?") and text == one_line(text) and text.startswith(("Is ", "Does ", "Was "))


def test_all_is_every_bundled_question_and_the_order_of_options_decides_nothing() -> None:
    own = "logo=Is there a logo = a sign of a firm?"
    asked = parse_questions(["watermark", own])
    assert asked == (
        NamedQuestion("logo", "Is there a logo = a sign of a firm?"),
        NamedQuestion("watermark", NAMED["watermark"]),
    )
    assert asked == parse_questions([own, "watermark"])
    assert [question.name for question in parse_questions([own, "all"])] == sorted(["logo", *NAMED])
    assert asked[0].column == "ask_logo"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["Is there a watermark?"], "a name is up to 40 letters, digits and _"),
        (["water mark=Is there one?"], "a name is up to 40 letters"),
        (["wäsche=Is there some?"], "a name is up to 40 letters"),
        (["=Is there one?"], "a name is up to 40 letters"),
        ([f"{'a' * 41}=Is it?"], "a name is up to 40 letters"),
        (["watermarks"], "no such question; there are blurred, "),
        (["watermark", "watermark"], "--ask watermark: is given twice"),
        (["all", "watermark=Is it owned?"], "--ask watermark: is given twice"),
        (["watermark", "Watermark=Is it owned?"], "differs from watermark in case alone"),
        (["all=Is it all?"], "all stands for all bundled questions"),
        (["logo=  "], "the question is empty"),
        (["logo=@logo.txt"], "the question is a file"),
        ([f"logo={'x' * (LONGEST + 1)}"], "has 1,001 characters"),
        ([], "--ask: no question is given"),
    ],
)
def test_what_is_no_question_is_refused_in_one_line(options: list[str], says: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_questions(options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_name_of_forty_letters_is_one() -> None:
    (question,) = parse_questions([f"{'a' * 40}={'x' * LONGEST}"])
    assert len(question.name) == 40
