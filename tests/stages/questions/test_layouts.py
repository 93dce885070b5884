"""Layouts of multiple choice as public benchmarks and training sets have them; what is ambiguous is refused."""

from __future__ import annotations

import base64
import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.manifests.shards import uid_of
from capipe.stages.questions.import_sets import QuestionRecord, read_question_set
from capipe.stages.questions.layouts import read_question
from capipe.stages.questions.match import ImageNames, QuestionIndex
from capipe.stages.questions.validate import checked

from ...conftest import photo

RED_BLUE = ["red", "blue", "green"]


def asked(**entry: Any) -> dict[str, Any]:
    return checked(read_question({"question": "What color is it?", **entry}), set())


def chosen(**entry: Any) -> str | None:
    """The right option's text, or the status of what was refused."""
    found = asked(**entry)
    return found["options"][found["answer"]] if found["status"] == "ok" else found["status"]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", ["B", "b", "B.", "(B)", "blue", "B. blue", "Option B", "The answer is B.", "Ｂ", "Ｂ．", 1]
)
@pytest.mark.parametrize(
    "options",
    [
        {"options": {"A": "red", "B": "blue", "C": "green"}},
        {"options": {"a": "red", "b": "blue", "c": "green", "d": None}},
        {"options": json.dumps({"A": "red", "B": "blue", "C": "green"})},
        {"choices": {"text": RED_BLUE, "label": ["A", "B", "C"]}},
        {"choices": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}, {"label": "C", "text": "green"}]},
        {
            "options": [
                {"id": "(A)", "content": "red"},
                {"id": "(B)", "content": "blue"},
                {"id": "(C)", "content": "green"},
            ]
        },
        {"options": [{"text": text} for text in RED_BLUE]},
        {"A": "red", "B": "blue", "C": "green", "D": ""},
        {"option_a": "red", "option_b": "blue", "option_c": "green", "option_d": float("nan")},
        {"choice_a": "red", "choice_b": "blue", "choice_c": "green"},
        {"multiple_choices": RED_BLUE},
        {"options": ["Ａ．red", "Ｂ．blue", "Ｃ．green"]},
        {"options": ["（A）red", "（B）blue", "（C）green"]},
    ],
)
def test_options(options: dict[str, Any], answer: object) -> None:
    assert asked(**options, answer=answer)["options"] == RED_BLUE
    assert chosen(**options, answer=answer) == "blue"


def test_options_by_name_in_another_order() -> None:
    shuffled = {"C": "green", "A": "red", "B": "blue"}
    assert asked(options=shuffled, answer="B")["options"] == RED_BLUE
    assert [chosen(options=shuffled, answer=answer) for answer in ("B", "blue", 1)] == ["blue", "blue", "bad_answer"]


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"A": "red", "C": "blue"}},
        {"options": {"first": "red", "second": "blue"}},
        {"options": {"A": "red", "B": None, "C": "blue"}},
        {"A": "red", "B": "", "C": "blue"},
        {"B": "red", "C": "blue"},
        {"A": "red"},
        {"options": [{"label": "A", "text": "red"}, {"text": "blue"}]},
        {"options": [{"label": "B", "text": "red"}, {"label": "B", "text": "blue"}]},
        {"options": [{"is_correct": True}, {"is_correct": False}]},
        {"option1": "red", "option2": "blue"},
    ],
)
def test_options_that_cannot_be_read_in_one_way(options: dict[str, Any]) -> None:
    assert chosen(**options, answer="A") == "bad_options"


@pytest.mark.parametrize(
    ("first", "answer", "expected"),
    [
        (1, "2", "blue"),
        (1, "blue", "blue"),
        (1, "B", "blue"),
        (1, 2, "bad_answer"),  # an index from 0, or the name?
        (1, 2.0, "bad_answer"),
        (1, "0", "bad_answer"),
        (0, "2", "green"),
        (0, 2, "green"),
        (0, 2.0, "green"),
        (0, 3, "bad_answer"),
    ],
)
def test_options_by_number(first: int, answer: object, expected: str) -> None:
    labels = [str(first + number) for number in range(3)]
    assert chosen(choices={"text": RED_BLUE, "label": labels}, answerKey=answer) == expected
    assert chosen(options=dict(zip(labels, RED_BLUE, strict=True)), answer=answer) == expected


def test_ten_options_by_number_stand_in_their_order() -> None:
    options = {str(number): f"option {chr(96 + number)}" for number in range(1, 11)}
    assert chosen(options=options, answer="10") == "option j"


def test_a_number_that_is_a_name_and_a_text() -> None:
    assert chosen(choices={"text": ["2", "3", "1"], "label": ["1", "2", "3"]}, answerKey="1") == "bad_answer"
    assert chosen(choices={"text": ["1", "3", "2"], "label": ["1", "2", "3"]}, answerKey="1") == "1"


# --- numbers and bools -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        ([True, False], True, "True"),
        ([False, True], "true", "True"),
        (["yes", "no"], False, "no"),
        (["No.", "Yes."], True, "Yes."),
        (["yes", "no", "true"], True, "bad_answer"),
        (["red", "blue"], True, "bad_answer"),
        ([True, False], 1, "bad_answer"),  # an index, or true?
        (["yes", "no"], 1, "no"),  # an int is an index
        ([2, 4, 6], 2, "bad_answer"),  # the text "2", or the third?
        ([2, 4, 6], 4, "4"),
        ([2, 4, 6], 6, "6"),
        ([2, 4, 6], 5, "bad_answer"),
        ([3, 4, 5], 3, "bad_answer"),  # the text "3", or the third by counting from 1?
        ([1, 2, 3], 3, "3"),
        ([2, 4, 6], "2", "2"),
        ([2.0, 4.0, 6.0], 4.0, "4"),
        ([1.0, 2.0], 1.0, "bad_answer"),
        (["1.0", "2.0"], 1.0, "bad_answer"),
        ([0.5, 1.5], 1.5, "1.5"),
        (["red", "blue"], 1.0, "blue"),  # pandas
        (["red", "blue"], 2, "bad_answer"),
    ],
)
def test_numbers_and_bools(options: list[Any], answer: object, expected: str) -> None:
    assert chosen(options=options, answer=answer) == expected


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"correct_answer": "blue"}, "blue"),
        ({"answerKey": "C"}, "green"),
        ({"correct_choice_idx": 2, "difficult_direct_answer": False}, "green"),
        ({"answer_index": "1"}, "blue"),  # CSV
        ({"answer": "", "correct_option": "B"}, "blue"),
        ({"answer": ["B"]}, "blue"),
        ({"answer": ["A", "B"]}, "bad_answer"),
        ({"answer": "blue", "answer_index": 1, "answer_key": "B"}, "blue"),
        ({"answer": "blue", "answer_index": 2}, "bad_answer"),
        ({"answer": "because of the sky", "correct_answer": "B"}, "bad_answer"),
        ({}, "bad_answer"),
    ],
)
def test_names_of_the_answer(answers: dict[str, Any], expected: str) -> None:
    assert chosen(options=RED_BLUE, **answers) == expected


def test_accents_in_either_form() -> None:
    composed, apart = "Café crème", unicodedata.normalize("NFD", "Café crème")
    assert composed != apart
    assert asked(options=[apart, "Tee"], answer=composed)["answer"] == 0
    assert asked(options=["Tee", composed], answer=apart)["answer"] == 1
    assert asked(options=[composed, apart], answer="A")["status"] == "bad_options"


# --- text ------------------------------------------------------------------------------------------------------------

LLAVA = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    "instruction",
    [
        LLAVA,
        f"\n{LLAVA}\n",
        "Please answer directly with only the letter of the correct option and nothing else.",
        "Respond with only the letter (A, B, C, or D) of the correct option.",
        "Select the best answer to the above multiple-choice question based on the image.\n"
        "Respond with only the letter (A or B) of the correct option.",
        "Please select the correct answer from the options above.",
        "Answer the question using a single word or phrase.",
        "Answer with the option’s letter.",
    ],
)
def test_what_tells_the_form_of_an_answer_is_no_part_of_a_question(instruction: str) -> None:
    text = f"<image>\nWhich\ncolor?\nOptions:\nA. red\nB. blue\nC. green\n{instruction}"
    found = asked(question=text, answer="B")
    assert (found["question"], found["options"], found["answer"]) == ("Which\ncolor?", RED_BLUE, 1)
    found = asked(question=f"Which color?\n{instruction}", options=RED_BLUE, answer="B")
    assert (found["question"], found["answer"]) == ("Which color?", 1)


@pytest.mark.parametrize(
    "text",
    [
        "Look at the sign.\nWhich letter is on it?",
        "Look at the sign.\nAnswer with the word that is written on it.",
        LLAVA,
        "Options:",
        "Choose the color of the hat",
    ],
)
def test_what_asks_stays(text: str) -> None:
    assert asked(question=text, options=RED_BLUE, answer="B")["question"] == text


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[QuestionRecord]:
    return list(read_question_set(str(path)))


def results(path: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """Of each record its names of the image, and its right options or statuses."""
    found = []
    for record in read(path):
        entries = [checked(question, set()) for question in record.questions]
        said = [entry["options"][entry["answer"]] if entry["status"] == "ok" else entry["status"] for entry in entries]
        found.append((record.images, said))
    return found


def write(path: Path, value: Any, indent: int | None = None) -> Path:
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    return path


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]


def test_conversations(tmp_path: Path) -> None:
    """LLaVA's mix: questions with letters among those that are open, and captions."""
    asks = "<image>\nWhich color?\nA. red\nB. blue\n" + LLAVA
    rows = [
        {
            "id": "1",
            "image": "a.jpg",
            "conversations": turns(asks, "B", "How many?\nA. 1\nB. 2", "A", "Why?", "It is."),
        },
        {"id": "2", "image": "b.jpg", "conversations": turns("Describe it.\n<image>", "A cat.")},
        {"id": "3", "conversations": turns("Which?\nA. x\nB. y", "A")},
        {"id": "4", "image": "d.jpg", "conversations": turns(asks)},
        {"id": "5", "image": "e.jpg", "conversations": [{"from": "system", "value": "Be kind."}]},
    ]
    expected = [
        (("a.jpg",), ["blue", "1", "bad_options"]),
        (("b.jpg",), ["bad_options"]),
        ((), ["x"]),
        (("d.jpg",), ["bad_answer"]),
        (("e.jpg",), ["malformed"]),
    ]
    assert results(write(tmp_path / "a.json", rows)) == expected
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert results(lines) == expected


def test_messages(tmp_path: Path) -> None:
    asks = "Which color?\nA. red\nB. blue"
    parts = [{"type": "image_url", "image_url": {"url": "c.jpg"}}, {"type": "text", "text": asks}]
    rows = [
        {"images": ["a.jpg"], "messages": [{"role": "user", "content": asks}, {"role": "assistant", "content": "B"}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]},
        {"image": "d.jpg", "texts": [{"user": f"Question: {asks}", "assistant": "Answer: B", "source": "s"}]},
    ]
    expected = [(("a.jpg",), ["blue"]), (("c.jpg",), ["red"]), (("d.jpg",), ["blue"])]
    assert results(write(tmp_path / "a.json", rows)) == expected


def test_lists_of_turns_as_older_datasets_keep_them(tmp_path: Path) -> None:
    said = {"from": ["human", "gpt"], "value": ["Which color?\nA. red\nB. blue", "B"]}
    pq.write_table(pa.Table.from_pylist([{"image": "a.jpg", "conversations": said}]), tmp_path / "a.parquet")
    assert results(tmp_path / "a.parquet") == [(("a.jpg",), ["blue"])]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("field", ["questions", "data", "annotations"])
def test_an_object_with_a_list(tmp_path: Path, indent: int | None, field: str) -> None:
    """SEED-Bench's layout among them."""
    seed = {"data_id": "1454426_2591111986", "question": "Which?", "answer": "B", "choice_a": "x", "choice_b": "y"}
    plain = {"image": "a.jpg", "question": "Which?", "options": ["x", "y"], "answer": "x"}
    path = write(tmp_path / "a.json", {"info": {}, field: [seed, plain, 3]}, indent)
    assert results(path) == [(("1454426_2591111986",), ["y"]), (("a.jpg",), ["x"]), ((), ["malformed"])]
    assert [record.where for record in read(path)] == [f"{path}[{number}]" for number in range(3)]


def test_one_record_alone_is_no_list_of_them(tmp_path: Path) -> None:
    record = {"image": "a.jpg", "questions": [{"question": "Which?", "options": ["x", "y"], "answer": "x"}]}
    for indent in (None, 1):
        assert results(write(tmp_path / "a.json", record, indent)) == [(("a.jpg",), ["x"])]


def test_vqa_and_coco(tmp_path: Path) -> None:
    """VQA has its answers and COCO its file names in lists of their own."""
    whole = {
        "images": [{"id": 5, "file_name": "val/000000000005.jpg"}],
        "questions": [{"image_id": 5, "question_id": 50, "question": "Which?", "multiple_choices": ["x", "y"]}],
        "annotations": [{"image_id": 5, "question_id": 50, "multiple_choice_answer": "y"}],
    }
    assert results(write(tmp_path / "a.json", whole)) == [(("val/000000000005.jpg",), ["y"])]
    a_okvqa = {
        "image_id": 7,
        "question": "Which?",
        "choices": ["x", "y"],
        "correct_choice_idx": 1,
        "direct_answers": [],
    }
    assert results(write(tmp_path / "b.json", [a_okvqa])) == [(("7", "000000000007.jpg"), ["y"])]
    named = {"image": "a.jpg", **a_okvqa}
    assert results(write(tmp_path / "b.json", [named])) == [(("a.jpg",), ["y"])]


@pytest.mark.parametrize("written", ["base64", "data:image/jpeg;base64,"])
def test_mmbench(tmp_path: Path, written: str) -> None:
    """Tab-separated, a column an option, the image in base64; its uid is that of the same bytes ingested."""
    image = photo(1, (640, 480))
    text = base64.b64encode(image).decode()
    row = {"index": "3", "question": "Which?", "A": "x", "B": "y", "C": "", "D": "", "answer": "B"}
    row["image"] = text if written == "base64" else written + text
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), delimiter="\t")
        writer.writeheader()
        writer.writerow(row)
    assert results(tmp_path / "a.tsv") == [((uid_of(image),), ["y"])]
    assert "image" not in json.loads(read(tmp_path / "a.tsv")[0].raw)
    row["image"] = "x" * 10_000  # no image
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.DictWriter(file, list(row), delimiter="\t").writerows([dict(zip(row, row, strict=True)), row])
    assert results(tmp_path / "a.tsv") == [((), ["y"])]


def test_structs_of_parquet_have_fields_for_other_rows(tmp_path: Path) -> None:
    two, four = {"A": "x", "B": "y"}, {"A": "x", "B": "y", "C": "z", "D": "w"}
    rows = [{"image": "a.jpg", "question": "Which?", "options": each, "answer": "B"} for each in (four, two)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [[len(question.options) for question in record.questions] for record in read(tmp_path / "a.parquet")] == [  # type: ignore[arg-type]
        [4],
        [2],
    ]
    assert results(tmp_path / "a.parquet") == [(("a.jpg",), ["y"])] * 2


def test_semicolons_and_tabs_in_csv(tmp_path: Path) -> None:
    for mark in ";\t":
        (tmp_path / "a.csv").write_text(mark.join(["image", "question", "A", "B", "answer"]) + "\n")
        with (tmp_path / "a.csv").open("a") as file:
            file.write(mark.join(["a.jpg", "Which, then?", "x, or", "y", "A"]) + "\n\n")
        assert results(tmp_path / "a.csv") == [(("a.jpg",), ["x, or"])]


def test_file_names_in_either_form() -> None:
    composed, apart = "photos/é.jpg", unicodedata.normalize("NFD", "photos/é.jpg")
    question = read_question({"question": "Which?", "options": ["x", "y"], "answer": "x"})
    for name, source in ((composed, apart), (apart, composed)):
        for image in (ImageNames("0", f"/data/{source}", "f" * 32), ImageNames(source.removesuffix(".jpg"))):
            index = QuestionIndex([QuestionRecord((name,), (question,), "{}", "set:1")], [image])
            assert index.unmatched() == []
