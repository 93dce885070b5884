"""The files of CaptionQA, Prism (as CapRL's evaluation has them), VLMEvalKit and MMMU, in their published layouts."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.manifests.shards import uid_of
from capipe.stages.questions.import_sets import read_question_set
from capipe.stages.questions.layouts import read_question
from capipe.stages.questions.open_ended import open_question
from capipe.stages.questions.validate import checked

from ...conftest import photo

IMAGE = photo(1, (640, 480))
HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."


def results(path: Path) -> list[tuple[tuple[str, ...], list[tuple[str, str]]]]:
    """Of each record its names of the image, and each question with its right option or its status."""
    found = []
    for record in read_question_set(str(path)):
        entries = [checked(question, set()) for question in record.questions]
        said = [
            (entry["question"], entry["options"][entry["answer"]] if entry["status"] == "ok" else entry["status"])
            for entry in entries
        ]
        found.append((record.images, said))
    return found


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


# --- CaptionQA -------------------------------------------------------------------------------------------------------


def test_captionqa(tmp_path: Path) -> None:
    """A row an image, with a list of its images and one of its questions."""
    questions = [
        {"question": "Which color?", "choices": ["red", "blue"], "answer": "B", "category": ["Attribute", "Color"]},
        {"question": "Is it big?", "choices": ["yes", "no"], "answer": "yes", "category": ["Attribute", "Size"]},
    ]
    row = {"id": "nat_001", "images": [{"bytes": IMAGE, "path": "nat_001.jpg"}], "questions": questions}
    several = {**row, "id": "nat_002", "images": row["images"] * 2}
    asked = [("Which color?", "blue"), ("Is it big?", "yes")]
    found = results(parquet(tmp_path / "natural.parquet", row, several))
    assert found == [((uid_of(IMAGE), "nat_001.jpg"), asked), ((), asked)]


# --- Prism -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Which color?\nA. red\nB. blue", "Which color?"),
        (
            "Question: Which color?\nOptions:\nA. red\nB. blue\n"
            "Please select the correct answer from the options above.",
            "Which color?",
        ),
        (f"<image>\n{HINT}\nQuestion: Which color?\nChoices:\n(A) red\n(B) blue", "Which color?"),
        ("Hint: The sky is blue.\nWhich color?\nA. red\nB. blue", "Hint: The sky is blue.\nWhich color?"),
        ("Here is one.\nQuestion: Which color?\nA. red\nB. blue", "Here is one.\nQuestion: Which color?"),
    ],
)
def test_prism(tmp_path: Path, prompt: str, question: str) -> None:
    rows = [{"image": "charts/1.png", "prompt": prompt, "answer": "B"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert results(tmp_path / "a.json") == [(("charts/1.png",), [(question, "blue")])]


def test_a_question_goes_before_a_prompt() -> None:
    entry = {"question": "Which?", "prompt": "Describe it.", "options": ["red", "blue"], "answer": "B"}
    assert checked(read_question(entry), set())["question"] == "Which?"
    assert checked(read_question({**entry, "question": None, "prompt": ["Which?"]}), set())["status"] == "malformed"


# --- VLMEvalKit ------------------------------------------------------------------------------------------------------


def test_rows_that_share_an_image_by_index(tmp_path: Path) -> None:
    """Each image is there once; other rows name the row that has it."""
    text = base64.b64encode(IMAGE).decode()
    rows = [
        {"index": "3", "image": text, "question": "Which?", "A": "x", "B": "y", "C": "", "D": "", "answer": "B"},
        {"index": "4", "image": "3", "question": "What?", "A": "x", "B": "y", "C": "z", "D": "", "answer": "C"},
        {"index": "5", "image": "9", "question": "Who?", "A": "x", "B": "y", "C": "", "D": "", "answer": "A"},
    ]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    uid = uid_of(IMAGE)
    assert results(tmp_path / "a.tsv") == [
        ((uid,), [("Which?", "y")]),
        ((uid, "3"), [("What?", "z")]),
        (("9",), [("Who?", "x")]),
    ]


# --- ChartQA and DocVQA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "image", "accepted"),
    [
        ({"imgname": "1.png", "query": "How much?", "label": "14"}, "1.png", ("14",)),
        ({"image": {"bytes": None, "path": "1.png"}, "query": "How much?", "label": ["14"]}, "1.png", ("14",)),
        ({"image": "documents/x_1.png", "question": "How much?", "answers": ["14", "14 %"]}, "x_1", ("14", "14 %")),
        ({"image": "1.png", "question": "How much?", "answers": [{"answer": "no"}], "answer": "14"}, "1", ("14",)),
        ({"image": "1.png", "question": "How much?", "label": "chart", "answer": "14"}, "1.png", ("14",)),
        ({"image": "1.png", "question": "How much?", "answers": []}, "1.png", None),
    ],
)
def test_open_ended_sets(tmp_path: Path, row: dict[str, Any], image: str, accepted: tuple[str, ...] | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (record,) = read_question_set(str(tmp_path / "a.json"))
    assert image in record.images[0]
    found = open_question(record.questions[0])
    assert (found and (found.text, found.answers)) == (accepted and ("How much?", accepted))


# --- MMMU ------------------------------------------------------------------------------------------------------------


def mmmu(**changes: Any) -> dict[str, Any]:
    empty = {f"image_{number}": None for number in range(2, 8)}
    return {
        "id": "validation_Accounting_1",
        "question": "<image 1> Which is the color in <image 1>?",
        "options": "['red', \"sky's blue\", 'gr\\xfcn']",
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": {"bytes": IMAGE, "path": "a.png"},
        **empty,
        **changes,
    }


def test_mmmu(tmp_path: Path) -> None:
    ten = repr([f"option {letter}" for letter in "abcdefghij"])
    rows = [
        mmmu(),
        mmmu(options=ten, answer="J"),
        mmmu(options="['<image 1>', '<image 2>']", answer="A"),
        mmmu(image_2={"bytes": photo(2, (640, 480)), "path": "b.png"}),
        mmmu(question_type="open", options="[]", answer="8"),
        mmmu(options="['red' 'blue']"),
        mmmu(options="[print('red'), 'blue']"),
    ]
    asked, names = "Which is the color in the image?", (uid_of(IMAGE), "a.png")
    assert results(parquet(tmp_path / "a.parquet", *rows)) == [
        (names, [(asked, "sky's blue")]),
        (names, [(asked, "option j")]),
        (names, [(asked, "bad_options")]),
        ((), [(asked, "sky's blue")]),
        (names, [(asked, "bad_options")]),
        (names, [(asked, "bad_options")]),
        (names, [(asked, "bad_options")]),
    ]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Which one? <image 1>", "Which one?"),
        ("<image 1><image 2> Which?", "Which?"),
        ("In <image 1>, which?", "In the image, which?"),
        ("Which is <5 or <image 0>?", "Which is <5 or <image 0>?"),
    ],
)
def test_marks_of_images(text: str, question: str) -> None:
    entry = {"question": text, "options": ["x", "y"], "answer": "x"}
    assert checked(read_question(entry), set())["question"] == question
