"""Rows that are too long or nested too deeply: each is one row with its reason, and the others are as they were."""

from __future__ import annotations

import csv
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.manifests.files.bounded_json import MAX_NESTING, is_deeper
from capipe.manifests.status import Status
from capipe.stages.ingest.source_refs import Item
from capipe.stages.questions.import_sets import read_question_set
from capipe.stages.reading import bounded_rows, json_files
from capipe.stages.reading.bounded_rows import MAX_ROW, Beyond, bounded_lines, csv_records

from ...conftest import photo
from ..ingesting import fill, ingest, load, reasons, rows

A, B = photo(1), photo(2, fmt="PNG")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {"a.jpg": A, "b.png": B})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bound, made small."""
    for module in (bounded_rows, json_files):
        monkeypatch.setattr(module, "MAX_ROW", 1000)
    return 1000


def outcome(items: list[Item]) -> list[str]:
    return ["ok" if item.problem is None else f"{item.problem.status}: {item.problem.reason}" for item in items]


def deep(levels: int, mark: str = "[") -> str:
    return "[" * levels + "]" * levels if mark == "[" else '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [MAX_NESTING + 1, 700, 900, 100_000])
@pytest.mark.parametrize("mark", ["[", "{"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_row_nested_deep(photos: Path, tmp_path: Path, levels: int, mark: str, name: str) -> None:
    texts = ['{"path": "a.jpg"}', f'{{"path": "b.png", "x": {deep(levels, mark)}}}', '{"path": "b.png"}']
    (photos / name).write_text("\n".join(texts) if name == "t.jsonl" else f"[{', '.join(texts)}]")
    ingest(photos / name, out=tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["status"] for row in found] == ["ok", "unsupported", "ok"]
    assert "nested too deeply" in found[1]["error"]


def test_a_row_as_deep_as_may_be(photos: Path) -> None:
    inner = MAX_NESTING - 1  # the row itself is one
    (photos / "t.jsonl").write_text(f'{{"path": "a.jpg", "x": {deep(inner)}}}\n{{"path": "a.jpg", "t": "{"[" * 500}"}}')
    assert [item.data for item in load(photos / "t.jsonl")] == [A, A]
    assert not is_deeper(json.loads(deep(MAX_NESTING))) and is_deeper(json.loads(deep(MAX_NESTING + 1)))


@pytest.mark.parametrize("size", [990, 1100, 5000, 3_000_000])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv"])
def test_a_row_that_is_long(photos: Path, small: int, size: int, name: str) -> None:
    """With brackets, quotes and escapes in it."""
    value = ('x, "y" ]}[{ \\ z' * size)[:size]
    if name.endswith("sv"):
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if name == "t.tsv" else ",")
        writer.writerows([["path", "text"], ["a.jpg", "one"], ["b.png", value], ["b.png", "three"]])
        (photos / name).write_text(text.getvalue())
    else:
        texts = [{"path": "a.jpg", "text": "one"}, {"path": "b.png", "text": value}, {"path": "b.png", "text": "three"}]
        (photos / name).write_text("\n".join(map(json.dumps, texts)) if name == "t.jsonl" else json.dumps(texts))
    first, long, last = load(photos / name)
    assert (first.data, first.text, last.data, last.text) == (A, "one", B, "three")
    if size > small:
        assert long.problem is not None and long.problem.status is Status.UNSUPPORTED
        assert "the row is too long (over 1000 characters" in long.problem.reason
    else:
        assert long.problem is not None or long.text == value


def test_a_long_row_of_many_lines_and_a_quote_that_is_not_closed(photos: Path, small: int) -> None:
    lines = 'line, ""quoted""\n' * 400
    (photos / "t.csv").write_text(f'path,text\na.jpg,one\nb.png,"{lines}"\nb.png,three\na.jpg,"never closed\n{lines}')
    items = load(photos / "t.csv")
    assert [item.text for item in items] == ["one", None, "three", None]
    assert "in 401 lines; is a quote not closed?" in str(reasons(items)[1])
    assert "a quote not closed" in str(reasons(items)[3])


@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_the_end_of_a_long_record_is_where_python_has_it(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """Random records, also such as no writer writes: the long ones are left out, and no other changes."""
    draw = random.Random(0)
    for _ in range(300):
        alphabet = ['"', '""', mark, "x", "\n", "\r\n", f'{mark}"', f'"{mark}', '"\n']
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(200)))
        feed: list[str] = []

        def watched(feed: list[str] = feed, text: str = text) -> Any:
            for line in io.StringIO(text, newline=""):
                feed.append(line)
                yield line

        wanted, reader = [], csv.reader(watched(), delimiter=mark)
        while True:
            feed.clear()
            record = next(reader, None)
            if record is None:
                break
            wanted.append(None if sum(map(len, feed)) > 20 else record)
        monkeypatch.setattr(bounded_rows, "MAX_ROW", 20)
        stream = io.StringIO(text, newline="")
        found = [None if isinstance(each, Beyond) else each for each in csv_records(stream, "", mark)]
        monkeypatch.undo()
        assert found == wanted, text


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_passing_over_a_value_in_chunks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int
) -> None:
    monkeypatch.setattr(json_files, "MAX_ROW", 30)
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    long = [{"a": 'x\\"]' * 9}, ["[{" * 20], '"\\' * 20, {"a": [{}, [], "}"] * 9}]
    for value in long:
        (tmp_path / "t.json").write_text(json.dumps([1, value, {"b": 2}, value]))
        with (tmp_path / "t.json").open("rb") as file:
            found = list(json_files.list_items(file))
        assert [isinstance(each, Beyond) for each in found] == [False, True, False, True] and found[2] == {"b": 2}
    for broken in (f'[{{"a": bad}}, "{"x" * 100}"]', f"[1, {'9' * 50}x]", '["' + "x" * 99, '[{"a": "' + "x" * 99 + '"'):
        (tmp_path / "t.json").write_text(broken)
        with (tmp_path / "t.json").open("rb") as file, pytest.raises(ValueError):
            list(json_files.list_items(file))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", pytest.param("t.json", marks=pytest.mark.slow)])
def test_a_line_of_hundreds_of_megabytes_takes_bounded_memory(photos: Path, name: str) -> None:
    start, end = {"t.csv": ('b.png,"', '"'), "t.jsonl": ('{"path": "', '"}'), "t.json": (', {"path": "', '"}')}[name]
    head = {"t.csv": "path,text\na.jpg,one\n", "t.jsonl": '{"path": "a.jpg"}\n', "t.json": '[{"path": "a.jpg"}'}[name]
    tail = {"t.csv": "\nb.png,three\n", "t.jsonl": '\n{"path": "b.png"}\n', "t.json": ', {"path": "b.png"}]'}[name]
    with (photos / name).open("w") as file:
        file.write(head + start)
        for _ in range(200):
            file.write("x" * (1 << 20))
        file.write(end + tail)
    tracemalloc.start()
    items = load(photos / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.data for item in items] == [A, None, B] and "too long" in str(reasons(items)[1])
    assert peak < 8 * MAX_ROW


def test_lines_of_bytes_and_of_text(small: int) -> None:
    for text in ("a\n" + "x" * 5000 + "\nb", "x" * 1001, "x" * 999 + "\n" + "y" * 1000, "\n\n"):
        wanted = [line if len(line) <= small else None for line in text.splitlines(keepends=True)]
        found = [None if isinstance(each, Beyond) else each for each in bounded_lines(io.StringIO(text, newline=""))]
        in_bytes = [
            None if isinstance(each, Beyond) else each.decode() for each in bounded_lines(io.BytesIO(text.encode()))
        ]
        assert found == in_bytes == wanted


def test_a_heading_that_is_long(photos: Path) -> None:
    (photos / "t.csv").write_text("path," + "x" * 2_000_000 + "\na.jpg,y\n")
    with pytest.raises(BadInput, match=r"t.csv: cannot be read as csv \(its first line, the heading, has over"):
        load(photos / "t.csv")


def test_metadata_of_a_folder(photos: Path, small: int) -> None:
    texts = [f'{{"file_name": "a.jpg", "x": {deep(700)}}}', f'{{"file_name": "a.jpg", "x": "{"y" * 3000}"}}']
    (photos / "metadata.jsonl").write_text("\n".join([*texts, '{"file_name": "b.png", "text": "of b"}']))
    items = load(photos)
    assert [(item.data, item.text) for item in items[:2]] == [(A, None), (B, "of b")]
    assert ["unsupported: the row" in each for each in outcome(items)[2:]] == [True, True]


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv"])
def test_question_sets(tmp_path: Path, small: int, name: str) -> None:
    sound = {"key": "k", "question": "What is it?", "A": "a cat", "B": "a dog", "answer": "A"}
    long = {**sound, "question": "x" * 5000}
    if name == "q.csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(sound))
        writer.writeheader()
        writer.writerows([sound, long, sound])
        (tmp_path / name).write_text(text.getvalue())
    else:
        nested = json.dumps(sound)[:-1] + f', "x": {deep(100_000)}}}'
        texts = [json.dumps(sound), json.dumps(long), nested, json.dumps(sound)]
        (tmp_path / name).write_text("\n".join(texts) if name == "q.jsonl" else f"[{','.join(texts)}]")
    records = list(read_question_set(str(tmp_path / name)))
    faults = [record.questions[0].fault for record in records]
    assert faults[0] is faults[-1] is None and all("the row is" in str(fault) for fault in faults[1:-1])
    assert len(records) == (3 if name == "q.csv" else 4)
