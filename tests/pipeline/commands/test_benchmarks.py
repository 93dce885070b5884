"""Benchmarks in their published layouts, from their files to the figures, by a reader on loopback.

It finds what captions tell. These are planted, each fact at a known word, so that every figure is known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.pipeline.inspect.verify import verify

from ...conftest import photo
from ...models.chat_server import Answer, Double, completion, serving
from ..conftest import capipe, one_line, table

IMAGES = [photo(number, (96, 64)) for number in (1, 2)]
BUDGETS = (50, 100, 200, 400)
#: The word at which a caption tells a fact, and the fact: one more in each budget, the last in none.
TOLD = ((1, "height is 104;"), (60, "title is Total Sale;"), (150, "share is 12;"), (300, "year is 1999;"))
TOLD = (*TOLD, (420, "shape is star;"))
#: Open-ended questions: what is accepted, and whether what is told is right by relaxed accuracy, scaled, and by ANLS.
OPEN: dict[str, tuple[Any, float, float, float]] = {
    "height": ("100", 1, 1, 2 / 3),
    "title": ("Total Sales", 0, 0, 10 / 11),
    "share": ("0.12", 0, 1, 0),
    "year": (["1999", "99"], 1, 1, 1),
    "shape": ("star", 1, 1, 1),
}
CHOICES = {"height": ["94", "104", "114"], "shape": ["star", "ring"]}


def planted() -> str:
    """A caption of 450 words with its facts at their places, and other words, all different, between them."""
    words: list[str] = []
    for at, fact in TOLD:
        words += [f"part{place}" for place in range(len(words), at - 1)]
        words += fact.split()
    return " ".join([*words, *(f"part{place}" for place in range(len(words), 449)), "end."])


def reads(text: str) -> str:
    """A reader's answer: the value told in the caption, or its letter; otherwise that it cannot tell."""
    caption = text[text.rindex("<caption>") : text.rindex("</caption>")] if "<caption>" in text else ""
    asked = re.search(r"Question: What is the (\w+)\?", text)
    if asked is None:
        return "yes"  # to what a server is asked before the first row
    told = re.search(rf"\b{asked[1]} is ([^;]+);", caption)
    value = told[1] if told else "Cannot tell"
    options = dict(re.findall(r"^([A-K])\. (.*)$", text[asked.end() :], re.MULTILINE))
    letters = [letter for letter, option in options.items() if option == value]
    return letters[0] if letters else value


def answers(number: int, body: dict[str, Any]) -> Answer:
    content = body["messages"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(part["type"] == "image_url" for part in parts):
        return completion(planted())
    return completion(reads("".join(part["text"] for part in parts)))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Double(answers)) as url:
        yield url


def write(path: Path, rows: Sequence[dict[str, Any]], **types: pa.DataType) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.Table.from_pylist(list(rows)).schema
    schema = pa.schema([pa.field(field.name, types.get(field.name, field.type)) for field in schema])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path


def imported(folder: Path, sources: Sequence[Path], questions: Path, *options: object) -> str:
    """Shards of a set's images, and its questions beside them; returns what was said on stderr."""
    capipe("ingest", *sources, "--out", folder / "shards")
    what = ("--import", questions, "--screen", "none", *options)
    return capipe("qa", "--shards", folder / "shards", "--out", folder / "qa", *what).stderr


def graded(folder: Path, server: str, *options: object) -> dict[str, Any]:
    """The report of captions by the server, read by it."""
    shards, prompt = ("--shards", folder / "shards"), ("--prompt", "caption=Describe the image.")
    capipe("annotate", *shards, "--out", folder / "captions", "--model", "captioner", "--engine", server, *prompt)
    asked = ("--questions", folder / "qa", "--captions", folder / "captions", "--out", folder / "eval")
    reader = ("--reader", "captioner", "--reader-engine", server, "--reader-mode", "sampled")
    capipe("eval", *shards, *asked, *reader, *options)
    report: dict[str, Any] = json.loads((folder / "eval/report.json").read_text())
    return report


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {system["name"]: system for system in report["systems"]}


# --- MMMU ------------------------------------------------------------------------------------------------------------


def mmmu_row(number: int, image: bytes, name: str, kind: str = "open", **more: Any) -> dict[str, Any]:
    asked = {
        "options": "[]",
        "answer": str(OPEN[name][0]),
    }  # several as a list in Python's notation
    if kind == "multiple-choice":
        asked = {"options": str(CHOICES[name]), "answer": "B" if name == "height" else "A"}
    empty = {f"image_{place}": None for place in range(2, 8)}
    return {
        "id": f"validation_Art_{number}",
        "question": f"<image 1> What is the {name}?",
        **asked,
        "explanation": "",
        "image_1": {"bytes": image, "path": f"validation_Art_{number}_1.png"},
        **empty,
        "img_type": "['Plots and Charts']",
        "topic_difficulty": "Easy",
        "question_type": kind,
        "subfield": "Art",
        **more,
    }


@pytest.fixture(scope="module")
def mmmu(tmp_path_factory: pytest.TempPathFactory, server: str) -> tuple[Path, dict[str, Any], str]:
    """Folder, report and messages of two subjects as MMMU has them: a row a question, each image in seven or more."""
    folder = tmp_path_factory.mktemp("mmmu")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {f"image_{number}": image for number in range(1, 8)}
    for subject, data in zip(("Art", "Math"), IMAGES, strict=True):
        rows = [mmmu_row(0, data, name) for name in OPEN]
        rows += [mmmu_row(1, data, name, "multiple-choice") for name in CHOICES]
        second = {"bytes": photo(3), "path": "b.png"}
        rows += [mmmu_row(2, data, "height", image_2=second)] if subject == "Art" else []
        write(folder / f"set/{subject}/validation-00000-of-00001.parquet", rows, **types)
    said = imported(folder, sorted((folder / "set").glob("*/*.parquet")), folder / "set", "--open-ended")
    marks = ("--marks", folder / "marks/marked")
    capipe("dedup", "--shards", folder / "shards", "--out", folder / "marks")
    what = ("--import", folder / "set", "--open-ended", "--screen", "none", *marks)
    capipe("qa", "--shards", folder / "shards", "--out", folder / "qa-marked", *what)
    (folder / "qa").rename(folder / "qa-all")
    (folder / "qa-marked").rename(folder / "qa")
    words = [option for budget in BUDGETS for option in ("--words", budget)]
    return folder, graded(folder, server, *words), said


def test_images_come_out_of_mmmus_parquet_and_each_question_is_asked_once(
    mmmu: tuple[Path, dict[str, Any], str],
) -> None:
    folder, report, said = mmmu
    assert "Art/validation-00000-of-00001.parquet[7]: it names no image, or several" in said
    assert "2 of the images with questions are in the shards several times" in said and "--marks" in said
    rows = table(folder / "qa/written")
    kept = [row for row in rows if row["status"] == "ok"]
    assert len(rows) == 15 and [row["status"] for row in rows].count("duplicate") == 13
    assert {row["uid"] for row in kept} == {hashlib.sha256(image).hexdigest()[:32] for image in IMAGES}
    for row in kept:
        assert [entry["question"] for entry in row["open_questions"]] == [f"What is the {name}?" for name in OPEN]
        assert [entry["status"] for entry in row["questions"]] == ["ok", "ok"]
        assert row["open_questions"][3]["answers"] == ["1999", "99"]
    assert (report["images"], report["questions"]) == (2, 4)
    twice = table(folder / "qa-all/written")
    assert sum(len(row["open_questions"] or ()) for row in twice) == 15 * 5, "without marks each copy has them all"


def test_figures_of_answers_in_words_are_those_of_the_planted_captions(mmmu: tuple[Path, dict[str, Any], str]) -> None:
    folder, report, _ = mmmu
    systems = by_name(report)
    whole = systems["caption"]["open_ended"]
    for place, measure in enumerate(("relaxed", "scaled", "anls"), 1):
        right = sum(entry[place] for entry in OPEN.values()) / len(OPEN)
        assert whole[measure]["value"] == pytest.approx(right) and whole[measure]["n"] == 2 * len(OPEN)
    assert (whole["abstained"]["value"], whole["unanswered"]) == (0, 0)
    assert systems["caption"]["quiz"]["accuracy"]["value"] == 1
    for control in ("blind", "empty", "generic"):
        assert systems[control]["open_ended"]["relaxed"]["value"] == 0
        assert systems[control]["open_ended"]["abstained"]["value"] == 1
    assert verify(str(folder / "eval/graded")).faults == [] and verify(str(folder / "qa/written")).faults == []
    assert {row["status"] for row in table(folder / "captions")} == {"ok"}
    first = table(folder / "eval/graded")[0]["open_answers"][0]
    assert (first["name"], first["answer"]) == ("caption", "104")
    page = (folder / "eval/report.md").read_text()
    assert "What is the title? Total Sale (Total Sales)" in page and "What is the year? 1999 (1999 or 99)" in page


def test_the_curve_over_word_budgets_is_in_the_tables(mmmu: tuple[Path, dict[str, Any], str]) -> None:
    folder, report, _ = mmmu
    systems = by_name(report)
    captions = {each["name"]: each["text"] for each in table(folder / "eval/graded")[0]["captions"]}
    names = [*(f"caption@{budget}" for budget in BUDGETS), "caption"]
    assert [len(captions[name].split()) for name in names] == [*BUDGETS, 450]
    curve = [systems[name]["quiz"]["accuracy"]["value"] for name in names]
    assert curve == [0.5, 0.5, 0.5, 0.5, 1.0]
    in_words = [systems[name]["open_ended"] for name in names]
    assert [each["relaxed"]["value"] for each in in_words] == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.6])
    assert [each["scaled"]["value"] for each in in_words] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8])
    assert [each["abstained"]["value"] for each in in_words] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    page = (folder / "eval/report.md").read_text()
    for title, values in (("Right %", curve), ("Relaxed accuracy %", [each["relaxed"]["value"] for each in in_words])):
        lines = page.partition(f"## {title} by word budget")[2].splitlines()
        assert lines[2] == "| system | 50 words | 100 words | 200 words | 400 words | all words |"
        cells = [cell.split(" ")[0] for cell in lines[4].strip("| ").split(" | ")]
        assert cells == ["caption", *(f"{100 * value:.1f}" for value in values)]


def test_the_report_and_the_viewer_show_answers_in_words(mmmu: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = mmmu
    page = Path(capipe("report", folder, "--out", folder / "report.html").stdout.strip()).read_text()
    assert "Answers in words to open-ended questions" in page and "eval: caption: Total Sale<br>" in page
    assert re.search(r"<td>caption@400</td>\s*<td class=\"n\">40.0</td>", page)
    pytest.importorskip("fastapi", reason="the viewer needs capipe[view]")
    from capipe.pipeline.view.library import id_of

    from ..viewing import all_rows, client_of, get

    with client_of(folder) as client:
        graded, names = id_of("eval/graded"), ["answers_caption", "answers_caption_50", "open_questions"]
        rows = [row["values"] for row in all_rows(client, a=graded, columns=names) if row["status"] == "ok"]
        assert len(rows) == 2 and get(client, "catalog")["damaged"] == {}
        assert rows[0]["answers_caption"] == "104; Total Sale; 12; 1999; star"
        assert rows[0]["answers_caption_50"] == "104" + "; Cannot tell" * 4 and rows[0]["open_questions"] == 5
        assert len(all_rows(client, a=graded, filter="open_questions == 5")) == 2
        parts = get(client, "row", a=graded, shard="00000", row=0)["parts"]
        assert parts["eval/graded"]["open_answers"][1]["answer"] == "Total Sale"


# --- CaptionQA and Prism ---------------------------------------------------------------------------------------------


def test_captionqa_from_its_parquet_to_its_score(tmp_path: Path, server: str) -> None:
    questions = [
        {"question": "What is the height?", "choices": CHOICES["height"], "answer": "104"},
        {"question": "What is the shape?", "choices": CHOICES["shape"], "answer": "star"},
        {"question": "What is the weight?", "choices": ["10 kg", "20 kg", "30 kg", "40 kg"], "answer": "10 kg"},
    ]
    asked = [{**each, "category": ["Attribute - Size"], "source": "gpt5"} for each in questions]
    rows = [
        {
            "id": f"nat_00{number}",
            "images": [{"bytes": image, "path": f"{number}.jpg"}],
            "questions": asked,
            "domain": "natural",
            "image_paths": [f"images/{number}.jpg"],
        }
        for number, image in enumerate(IMAGES, 1)
    ]
    source = write(tmp_path / "CaptionQA/natural/val-00000-of-00001.parquet", rows)
    assert "several times" not in imported(tmp_path, [source], source)
    report = graded(tmp_path, server, "--no-controls")
    (system,) = report["systems"]
    assert system["quiz"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert system["quiz"]["score"]["value"] == pytest.approx((1 + 1 + (1 / 4 + 0.05)) / 3)


def test_prism_from_its_json_and_a_folder_of_images(tmp_path: Path, server: str) -> None:
    (tmp_path / "images/ChartQA").mkdir(parents=True)
    for number, image in enumerate(IMAGES):
        (tmp_path / f"images/ChartQA/{number}.png").write_bytes(image)
    hint = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    choice = f"{hint}\nQuestion: What is the height?\nChoices:\n(A) 94\n(B) 104\n(C) 114"
    opened = "Question: What is the height?\nAnswer the question using a single word or phrase."
    rows = [
        {"image": f"ChartQA/{number}.png", "prompt": prompt, "answer": answer}
        for number in range(2)
        for prompt, answer in ((choice, "B"), (opened, "100"))
    ]
    (tmp_path / "prism.json").write_text(json.dumps(rows))
    imported(tmp_path, [tmp_path / "images"], tmp_path / "prism.json", "--open-ended")
    system = by_name(graded(tmp_path, server))["caption"]
    assert system["quiz"]["accuracy"]["value"] == system["open_ended"]["relaxed"]["value"] == 1
    assert system["open_ended"]["anls"]["value"] == pytest.approx(2 / 3)


def test_a_set_of_open_ended_questions_alone(tmp_path: Path, server: str) -> None:
    """No quiz: its figures are empty, the report has those of the answers in words."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.jpg").write_bytes(IMAGES[0])
    lines = [{"image": "0.jpg", "question": f"What is the {name}?", "answer": entry[0]} for name, entry in OPEN.items()]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    imported(tmp_path, [tmp_path / "images"], tmp_path / "set.jsonl", "--open-ended")
    system = by_name(graded(tmp_path, server, "--words", 50))["caption"]
    assert system["quiz"]["accuracy"]["value"] is None and system["open_ended"]["relaxed"]["value"] == 0.6
    page = (tmp_path / "eval/report.md").read_text()
    assert "## Relaxed accuracy % by word budget" in page and "## Right % by word budget" not in page
    html = Path(capipe("report", tmp_path).stdout.strip()).read_text()
    assert "Answers in words" in html and "Questions answered right" not in html
    qa = ("qa", "--shards", tmp_path / "shards", "--out", tmp_path / "other", "--import", tmp_path / "set.jsonl")
    refused = capipe(*qa, "--screen-model", "tiny/teacher", "--open-ended", code=2)
    assert "--open-ended: such questions are not screened" in one_line(refused)
