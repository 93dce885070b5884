"""What makes a question usable: every refusal with its status, and nothing that raises."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import QUESTION, QUESTION_FIELDS
from capipe.models.quiz import Question
from capipe.stages.questions.validate import RawQuestion, abstains, checked, kind_of, refers_to_others


def check(options: object, answer: object, text: object = "What color is the hat?") -> dict[str, Any]:
    entry = checked(RawQuestion(text, options, answer), set())
    assert list(entry) == [field.name for field in QUESTION_FIELDS]
    assert (entry["status"] == "ok") == (entry["error"] is None)
    assert (entry["id"] is not None) == (entry["answer"] is not None) == (entry["status"] in ("ok", "duplicate"))
    return entry


def right(options: object, answer: object) -> str:
    entry = check(options, answer)
    assert entry["status"] == "ok", entry["error"]
    return str(entry["options"][entry["answer"]])


def test_a_sound_question_keeps_its_words_and_has_its_id() -> None:
    entry = checked(RawQuestion(" What is\nthere? ", ["A dog ", "a cat"], "a cat", "Objects"), set())
    assert entry["question"] == "What is\nthere?"
    assert entry["options"] == ["A dog", "a cat"]
    assert (entry["answer"], entry["kind"], entry["status"]) == (1, "object", "ok")
    assert entry["id"] == Question("What is\nthere?", ("A dog", "a cat"), 1).id


@pytest.mark.parametrize(
    "text", ["", "  \n", None, 3, b"What?", ["What?"], {"text": "What?"}, float("nan"), "x" * 2001]
)
def test_no_question_is_malformed(text: object) -> None:
    entry = check(["red", "blue"], "red", text)
    assert entry["status"] == "malformed"
    assert len(entry["question"] or "") <= 2000


@pytest.mark.parametrize(
    "options",
    [
        None,
        "red, blue",
        {"A": "red", "B": "blue"},
        [],
        ["red"],
        ["red", float("nan")],
        ["red", None],
        ["red", ["blue"]],
        ["red", ""],
        ["A) red", "B) "],
        ["red", "blue", "Red "],
        ["red", "blue", "red."],
        list("abcdefghijk"),
        [str(n) for n in range(50_000)],
        ["red", "x" * 2001],
        ["red", "Cannot tell"],
    ],
)
def test_bad_options(options: object) -> None:
    entry = check(options, "red")
    assert entry["status"] == "bad_options"
    assert all(len(option) <= 2000 for option in entry["options"])
    assert len(entry["error"]) <= 300


@pytest.mark.parametrize(
    "option",
    [
        "both A and B",
        "Both (A) and (C)",
        "A and C",
        "a and c",
        "A, B and C",
        "A, C",
        '"A" or "B"',
        "Neither A nor B",
        "Both A and B are visible",
        "options A and B",
        "same as option B",
        "only B",
        "A only",
        "all except C",
        "All of the above",
        "all the above",
        "none of the above.",
        "None of the above are correct",
        "Any of the following",
        "either of these",
        "None of the others",
        "both options",
        "none of the given options",
        "the previous option",
        "red, or none of the above",
    ],
)
def test_options_that_speak_of_others(option: str) -> None:
    assert check(["red", "blue", "green", option], "red")["status"] == "bad_options"
    assert refers_to_others(option, 4)


@pytest.mark.parametrize(
    "option",
    [
        "A",
        "a dog and a cat",
        "vitamin A",
        "Plan B",
        "Hepatitis A and B",
        "A and Z",
        "A/C",
        "None",
        "both",
        "Neither",
        "Both dogs",
        "either a dog or a cat",
        "above the door",
        "one above the other",
        "the above-ground pool",
        "all of the people",
        "none of the windows are open",
        "Some of these birds",
        "some other color",
        "No answer",
        "only a dog",
        "B. Obama",
    ],
)
def test_options_that_only_look_so(option: str) -> None:
    assert right(["red", option, "blue", "green"], f"B. {option}") == option


def test_letters_beyond_the_options_are_no_references() -> None:
    assert not refers_to_others("A and D", 3)
    assert refers_to_others("A and D", 4)


@pytest.mark.parametrize(
    "text",
    [
        "Cannot tell",
        "can't tell.",
        "Can’t say",
        "Can not answer based on the caption",
        "It cannot be determined from the image",
        "Not enough information",
        "There is not enough information to answer",
        "Unable to determine",
        "I don't know",
    ],
)
def test_abstaining_is_taken_out_and_never_right(text: str) -> None:
    assert abstains(text)
    entry = check(["red", text, "blue"], "C")
    assert (entry["options"], entry["answer"], entry["status"]) == (["red", "blue"], 1, "ok")
    for answer in ("B", text, 1):
        entry = check(["red", text, "blue"], answer)
        assert (entry["status"], entry["error"]) == ("bad_answer", "the answer is to abstain")
    assert check(["red", "blue"], text)["error"] == "the answer is to abstain"


@pytest.mark.parametrize("text", ["I cannot tell a lie", "Unknown Pleasures", "It cannot be seen", "Tell"])
def test_not_abstaining(text: str) -> None:
    assert not abstains(text)


def test_ten_options_beside_one_that_abstains() -> None:
    assert right([*"qrstuvwxyz", "Cannot tell"], "z") == "z"
    labelled = [
        f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJK", [*"qrstuvwxyz", "I don't know"], strict=True)
    ]
    assert right(labelled, "J") == "z" and check(labelled, "J")["options"] == [*"qrstuvwxyz"]
    assert right(["Cannot tell", *"qrstuvwxyz"], "K") == "z"


@pytest.mark.parametrize("count", [11, 12, 40])
def test_more_options_are_refused_in_words(count: int) -> None:
    entry = check([f"option {number}" for number in range(count)], "A")
    assert (entry["status"], entry["error"]) == ("bad_options", f"{count} options, not 2 to 10")


def test_who_asks_for_fewer_options_gets_no_more() -> None:
    six, seven = [*"uvwxyz"], [*"tuvwxyz"]
    entry = checked(RawQuestion("What?", seven, "z"), set(), most=6)
    assert (entry["status"], entry["error"]) == ("bad_options", "7 options, not 2 to 6")
    assert checked(RawQuestion("What?", [*six, "Cannot tell"], "z"), set(), most=6)["status"] == "ok"


@pytest.mark.parametrize(
    "options",
    [
        ["A) red", "B) blue", "C) green"],
        ["A. red", "B. blue", "C. green"],
        ["- A) red", "- B) blue", "- C) green"],
        ["(a) red", "(b) blue", "(c) green"],
        ["A: red", "B： blue", "C、green"],
    ],
)
def test_labels_are_taken_off(options: list[str]) -> None:
    for answer in ("B", "b)", "(B)", "**B**", "B. blue", "blue", "The answer is B.", options[1], 1):
        assert right(options, answer) == "blue"
    assert check(options, "B")["options"] == ["red", "blue", "green"]


def test_labels_are_left_where_not_all_options_have_their_own() -> None:
    assert right(["A. Lincoln", "Obama"], "A") == "A. Lincoln"
    assert right(["J. Doe", "B. Obama", "C. Rice"], "B. Obama") == "B. Obama"
    assert right(["A.M.", "B.C."], "B.C.") == "B.C."
    assert right(["A", "B", "C"], "B") == "B"
    assert right(["A.", "B."], "B.") == "B."


def test_labels_out_of_order_are_not_guessed_at() -> None:
    assert check(["B) red", "A) blue"], "A")["status"] == "bad_options"
    assert check(["A) red", "B) blue", "D) green"], "D")["status"] == "bad_options"
    assert check(["B. red", "A. blue"], "A")["status"] == "bad_answer"


def test_the_order_of_the_letters_counts_before_abstaining_is_taken_out() -> None:
    entry = check(["A) Cannot tell", "B) red", "C) blue"], "C")
    assert (entry["options"], entry["answer"]) == (["red", "blue"], 1)
    assert check(["Cannot tell", "red", "blue"], 1)["answer"] == 0


@pytest.mark.parametrize("answer", ["purple", "C", "F)", "B. purple", "2", -1, 2, 10**400, "", " ", "x" * 5000])
def test_answers_that_are_no_option(answer: object) -> None:
    assert check(["red", "blue"], answer)["status"] == "bad_answer"


@pytest.mark.parametrize("answer", [None, True, 1.5, float("nan"), b"red", ["red"], {"answer": "red"}])
def test_answers_of_other_types(answer: object) -> None:
    assert check(["red", "blue"], answer)["status"] == "bad_answer"


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["B", "A", "C"], "A"),
        (["red", "blue", "A"], "A"),
        (["red", "blue"], "B. red"),
        (["A) B", "B) A"], "A"),
        (["1", "2", "3"], 1),
    ],
)
def test_two_readings_that_differ_are_refused(options: list[str], answer: object) -> None:
    entry = check(options, answer)
    assert entry["status"] == "bad_answer"
    assert "ambiguous" in entry["error"]


def test_an_answer_is_compared_as_options_are() -> None:
    assert right(["blue", "A Red  hat"], "a red hat.") == "A Red  hat"


def test_two_readings_that_agree_are_taken() -> None:
    assert right(["A", "B", "C"], "B") == "B"
    assert right(["A) B", "B) A"], "A) B") == "B"
    assert right(["3", "1", "2"], 1) == "1"
    assert right(["1", "2"], "2") == "2"  # text is never an index
    assert right(["B", "A"], "A. B") == "B"


def test_the_same_question_twice() -> None:
    seen: set[str] = set()
    bad = checked(RawQuestion("What is it?", ["a dog"], "a dog"), seen)
    first = checked(RawQuestion("What is it?", ["a dog", "a cat"], "a dog"), seen)
    again = checked(RawQuestion("what  IS it?", ["a cow", "a cat"], "a cat"), seen)
    other = checked(RawQuestion("What is that?", ["a dog", "a cat"], "a dog"), seen)
    assert [entry["status"] for entry in (bad, first, again, other)] == ["bad_options", "ok", "duplicate", "ok"]
    assert again["options"] == ["a cow", "a cat"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Color", "color"),
        ("colour", "color"),
        ("OCR", "text"),
        ("location", "position"),
        ("spatial", "position"),
        ("spatial_relation", "position"),
        ("number", "count"),
        ("counting", "count"),
        ("attribute", "other"),
        ("weather", "other"),
        (None, "other"),
        (3, "other"),
        (["color"], "other"),
        ("x" * 10**6, "other"),
    ],
)
def test_kinds(kind: object, expected: str) -> None:
    assert kind_of(kind) == expected


def test_nothing_raises_and_everything_fits_the_schema() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    values = [deep, None, b"\xff", float("nan"), "\ud800", "a\x00b", "A", "B)", 1, -1, "x" * 10_000, {}, ["a", "b"]]
    values += [["\ud800", "x"], ["A) a", "B) b"], ["a", deep], [["a"], "b"], ["a", "b", "A and B"]]
    rng = random.Random(0)
    entries = [checked(RawQuestion(*rng.choices(values, k=4)), set()) for _ in range(3000)]
    statuses = {entry["status"] for entry in entries}
    assert statuses == {"ok", "malformed", "bad_options", "bad_answer"}
    assert pa.array(entries, QUESTION).validate(full=True) is None


def test_a_letter_that_only_folds_to_one_of_ours_is_no_letter() -> None:
    entry = checked(RawQuestion("What?", ["red", "blue"], "\u0130"), set())
    assert entry["status"] == "bad_answer"
