"""Open-ended questions made multiple choice: which options they get, and which questions get none."""

from __future__ import annotations

import random
from typing import Any

import pytest

from capipe.stages.questions.distractors import answer_form, close_sets
from capipe.stages.questions.import_sets import QuestionRecord
from capipe.stages.questions.validate import RawQuestion, checked


def ask(image: str, text: str, answer: object, kind: str | None = None, options: object = None) -> QuestionRecord:
    return QuestionRecord((image,), (RawQuestion(text, options, answer, kind),), "", image)


def colors(*answers: object) -> list[QuestionRecord]:
    return [ask(f"{n}.jpg", "What color?", answer) for n, answer in enumerate(answers)]


def results(records: list[QuestionRecord], **options: int) -> list[dict[str, Any]]:
    return [checked(entry, set()) for record in close_sets(records, **options) for entry in record.questions]


def test_options_are_answers_of_the_group_and_the_right_one_is_right() -> None:
    answers = ["red", "blue", "green", "white", "black", "pink"]
    records = [*colors(*answers), ask("x.jpg", "Which animal?", "dog")]
    entries = results(records)
    for answer, entry in zip(answers, entries, strict=False):
        assert entry["status"] == "ok", entry["error"]
        assert len(entry["options"]) == 4 and set(entry["options"]) <= set(answers)
        assert entry["options"][entry["answer"]] == answer
    assert "1 different answers" in entries[-1]["error"]
    assert len({frozenset(entry["options"]) for entry in entries[:-1]}) > 1


def test_the_place_of_the_right_one_and_the_wrong_ones_are_drawn_evenly() -> None:
    words = ["red", "blue", "green", "white", "black", "pink"]
    entries = results(colors(*(words[n % 6] for n in range(1200))))
    places = [sum(entry["answer"] == place for entry in entries) for place in range(4)]
    assert min(places) > 230  # 300 expected, 15 the standard deviation
    wrong = [sum(word in entry["options"] for entry in entries) for word in words]
    assert min(wrong) > 700  # 200 + 1000 * 3/5 = 800 expected


def test_options_depend_on_the_seed_and_not_on_the_order_of_records() -> None:
    records = colors("red", "blue", "green", "white", "Black", "black", "pink", "Pink", "black")
    shuffled = records.copy()
    random.Random(1).shuffle(shuffled)
    first = {record.where: record for record in close_sets(records)}
    assert {record.where: record for record in close_sets(shuffled)} == first
    assert {record.where: record for record in close_sets(records, seed=1)} != first


def test_of_two_spellings_as_common_one_stands_for_both_in_any_order() -> None:
    records = colors("red", "blue", "green", "Black", "black")
    first = {record.where: record for record in close_sets(records)}
    assert {record.where: record for record in close_sets(reversed(records))} == first


def test_number_of_options() -> None:
    records = colors("red", "blue", "green", "white", "black", "pink", "gray", "brown", "teal", "gold")
    assert {len(entry["options"]) for entry in results(records, distractors=9)} == {10}
    assert {len(entry["options"]) for entry in results(records, distractors=1)} == {2}
    for wrong in (0, 10):
        with pytest.raises(ValueError, match="distractors"):
            close_sets(records, distractors=wrong)


def test_small_groups_are_refused() -> None:
    (entry, *_) = entries = results(colors("red", "blue", "Red.", "green"))
    assert {e["status"] for e in entries} == {"bad_options"}
    assert entry["error"] == "its group has 3 different answers, fewer than 4"
    entries = results(colors("red", "blue", "green"), fewest=2)
    assert {e["error"] for e in entries} == {"its group has 2 wrong answers, fewer than 3"}
    assert {e["status"] for e in results(colors("red", "blue", "green"), fewest=3, distractors=2)} == {"ok"}


def test_kinds_are_groups_of_their_own() -> None:
    texts = {"hat": "red", "car": "blue", "dog": "brown", "sky": "grey"}
    records = [ask(noun, f"What color is the {noun}?", color, "color") for noun, color in texts.items()]
    assert {entry["status"] for entry in results(records)} == {"ok"}
    records = [ask(noun, f"What color is the {noun}?", color) for noun, color in texts.items()]
    assert {entry["status"] for entry in results(records)} == {"bad_options"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("two", "2"),
        ("Two dogs.", "2 dog"),
        ("dog", "dogs"),
        ("a dog", "the dogs"),
        ("box", "boxes"),
        ("glass", "glasses"),
        ("bus", "buses"),
        ("horse", "horses"),
        ("berry", "berries"),
        ("cookie", "cookies"),
        ("toy", "toys"),
        ("woman", "women"),
        ("person", "people"),
        ("1,000", "1000"),
        ("none", "zero"),
    ],
)
def test_variants_are_never_options_together(one: str, other: str) -> None:
    assert answer_form(one) == answer_form(other)
    for entry in results(colors(one, other, "red", "green", "blue"), fewest=1):
        assert entry["status"] == "ok"
        assert len({one, other} & set(entry["options"])) < 2


def test_answers_that_differ_stay_apart() -> None:
    words = (
        "red blue green white black pink purple grey brown beige orange yellow dog cat car tree S E 1 2 12 left right"
    )
    assert len({answer_form(word) for word in words.split()}) == len(words.split())


def test_another_answer_to_the_same_question_about_the_same_image_is_no_wrong_option() -> None:
    records = [*colors("red", "blue", "green", "white", "black"), ask("0.jpg", "what color?", "black")]
    for entry in (results(records)[0], results(records)[-1]):
        assert not {"red", "black"} <= set(entry["options"])
        assert entry["status"] == "ok"


def test_long_and_abstaining_answers() -> None:
    records = colors("red", "blue", "green", "white", "cannot tell", "red with a few blue dots")
    *short, abstaining, long = results(records)
    assert {entry["status"] for entry in short} == {"ok"}
    assert {len(set(entry["options"]) - {"red", "blue", "green", "white"}) for entry in short} == {0}
    assert (abstaining["status"], abstaining["error"]) == ("bad_answer", "the answer is to abstain")
    assert long["status"] == "bad_options" and "6 words" in long["error"]


def test_numbers_and_letters_are_read_as_the_texts_they_are() -> None:
    for answers in ([1, 2, 3, 4, 5], ["1", "2", "0", "3"], list("ABCD"), list("BADC")):
        for answer, entry in zip(answers, results(colors(*answers)), strict=True):
            assert entry["status"] == "ok", entry["error"]
            assert entry["options"][entry["answer"]] == str(answer)


def test_everything_else_stays_as_it_is() -> None:
    broken: list[Any] = [None, "", b"red", ["red"], float("nan"), "x" * 5000]
    records = [
        ask("a.jpg", "What color?", "A", options=["red", "blue"]),
        ask("a.jpg", "What color?", "red", options=["red"]),
        *colors(*broken),
        QuestionRecord(("b.jpg",), (RawQuestion(None, None, "red"),), "", ""),
        QuestionRecord(("b.jpg",), (), "", ""),
    ]
    assert close_sets(records) == records
