"""Scores of answers, by hand and against the definitions of their papers."""

from __future__ import annotations

import pytest

from capipe.stages.questions.answer_scores import (
    SCALES,
    anls,
    captionqa_score,
    edit_distance,
    final_answer,
    number_of,
    relaxed_accuracy,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        (" -4 ", -4),
        ("−4", -4),
        ("1,200", 1200),
        ("1,234,567.5", 1234567.5),
        ("$3.5", 3.5),
        ("-$3.5", -3.5),
        ("12%", 0.12),
        ("12 %", 0.12),
        (".5", 0.5),
        ("5.", 5),
        ("12,34", None),
        ("about 12", None),
        ("12 dogs", None),
        ("nan", None),
        ("inf", None),
        ("1e5", None),
        ("9" * 400, None),
        ("", None),
    ],
)
def test_numbers(text: str, number: float | None) -> None:
    assert number_of(text) == (None if number is None else pytest.approx(number))


@pytest.mark.parametrize(
    ("predicted", "answer", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("106", "100", False),
        ("-100", "100", False),
        ("-96", "-100", True),
        ("0", "0", True),
        ("0.001", "0", False),
        ("12%", "0.12", True),
        ("2014", "2020", True),  # the published metric takes years as numbers
        ("Blue.", "blue", True),
        ("dark blue", "blue", False),
        ("100", "one hundred", False),
        ("12", "0.12", False),
    ],
)
def test_relaxed_accuracy(predicted: str, answer: str, right: bool) -> None:
    assert relaxed_accuracy(predicted, [answer]) == right
    assert relaxed_accuracy(predicted, ["something else", answer]) == right
    assert relaxed_accuracy(predicted, []) == 0


def test_relaxed_accuracy_at_other_scales() -> None:
    assert [relaxed_accuracy(said, ["0.12"], scales=SCALES) for said in ("12", "0.12", "0.0012", "1.2")] == [1, 1, 1, 0]
    assert relaxed_accuracy("12", ["0"], scales=SCALES) == 0


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_anls() -> None:
    assert anls("Coca Cola", ["coca  cola"]) == 1
    assert anls("cola", ["cole"]) == pytest.approx(0.75)
    assert anls("cola", ["coat"]) == 0, "half of it differs"
    assert anls("abcde", ["abcxy"]) == pytest.approx(0.6)
    assert anls("abcde", ["abcxy", "abcdz"]) == pytest.approx(0.8), "the nearest answer counts"
    assert anls("", ["cola"]) == anls("cola", []) == 0
    assert anls("cola " * 100_000, ["cola"]) == 0


def test_captionqa_score() -> None:
    assert captionqa_score(1, 0, 1, 4) == 1
    assert captionqa_score(0, 0, 1, 4) == 0
    assert captionqa_score(0, 1, 1, 4) == pytest.approx(0.3)
    assert captionqa_score(2, 1, 5, 2) == pytest.approx((2 + 0.55) / 5)
    for scored, options in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="nothing to score"):
            captionqa_score(0, 0, scored, options)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Blue.", "Blue"),
        ("\n **12** \nBecause it says so.", "12"),
        ("It says 3 and 4.\nSo the answer is 7.", "7"),
        ("Answer: red\nNo. Final answer: **blue**", "blue"),
        (r"It is \boxed{3}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"The answer is \boxed{4}", "4"),
        (r"The answer is 5 \boxed{4", r"5 \boxed{4"),
        (" \n ", ""),
    ],
)
def test_final_answer(reply: str, answer: str) -> None:
    assert final_answer(reply) == answer
