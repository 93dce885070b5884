"""Question sets made elsewhere: their layouts, their faults, and which images they are about."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.shards import uid_of
from capipe.stages.questions.import_sets import QuestionRecord, read_question_set
from capipe.stages.questions.match import ImageNames, QuestionIndex
from capipe.stages.questions.validate import RawQuestion, checked

from ...conftest import photo

QUESTION = {"question": "What color is the hat?", "options": ["red", "blue"], "answer": "B"}


def lines(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str | Path) -> list[QuestionRecord]:
    return list(read_question_set(str(path)))


def entries(record: QuestionRecord) -> list[dict[str, Any]]:
    seen: set[str] = set()
    return [checked(question, seen) for question in record.questions]


def only(path: str | Path) -> dict[str, Any]:
    (record,) = read(path)
    (entry,) = entries(record)
    return entry


def statuses(path: str | Path) -> list[str]:
    return [entry["status"] for record in read(path) for entry in entries(record)]


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_caprl_with_options_in_the_question(tmp_path: Path) -> None:
    text = "Which dish\nis on the\n\ntable?\n   - A) Soup\n   - B) Rice - with peas\n\n   - C) None\n"
    text += "   - D) Can not answer based on the caption"
    item = {
        "image_path": "images/a.jpg",
        "qa_list": [{"question": text, "answer": "B"}, [text.replace("dish", "x"), "C"]],
    }
    rows = [item, {"image_path": "images/b.jpg", "qa_list": [{"question": text, "answer": "A"}]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for path in (tmp_path / "a.json", lines(tmp_path / "b.jsonl", rows)):
        first, second = read(path)
        assert (first.images, second.images) == (("images/a.jpg",), ("images/b.jpg",))
        entry, pair = entries(first)
        assert entry["question"] == "Which dish\nis on the\n\ntable?"
        assert entry["options"] == ["Soup", "Rice - with peas", "None"]
        assert (entry["answer"], entry["status"]) == (1, "ok")
        assert (pair["question"], pair["answer"]) == ("Which x\nis on the\n\ntable?", 2)
        assert json.loads(first.raw) == item
    assert [record.where for record in read(tmp_path / "b.jsonl")] == [f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:2"]


def test_caprl_as_released(tmp_path: Path) -> None:
    """The columns of internlm/CapRL-QA-75K: the image's bytes, and the questions as a reward model's ground truth."""
    truth = [{"question": "Which city?", "choices": ["A) 北京市", "B) 上海市", "C) 惠州市"], "answer": "C"}]
    prompt = [{"role": "user", "content": "<image> Please describe this image in detail."}]
    row = {"id": "d976b8c551d62f12920218d54ecb6a58", "image": {"bytes": photo(1), "path": None}, "prompt": prompt}
    row |= {"data_source": "image_caption_rl", "reward_model": {"ground_truth": truth}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-00000.parquet")
    (record,) = read(tmp_path)
    assert record.images == (uid_of(photo(1)),)
    (entry,) = entries(record)
    assert (entry["options"], entry["answer"]) == (["北京市", "上海市", "惠州市"], 2)
    raw = json.loads(record.raw)
    assert raw["image"] == {"path": None}
    assert raw["reward_model"] == {"ground_truth": truth}


@pytest.mark.parametrize("field", ["qa_list", "questions", "qa", "message", "ground_truth"])
def test_names_of_the_list(tmp_path: Path, field: str) -> None:
    assert only(lines(tmp_path / "a.jsonl", [{"image": "a.jpg", field: [QUESTION]}]))["status"] == "ok"
    assert only(lines(tmp_path / "a.jsonl", [{"image": "a.jpg", field: json.dumps([QUESTION])}]))["status"] == "ok"


@pytest.mark.parametrize(
    ("names", "images"),
    [
        ({"image": "a.jpg"}, ("a.jpg",)),
        ({"image_path": "x/a.jpg"}, ("x/a.jpg",)),
        ({"images": ["a.jpg"]}, ("a.jpg",)),
        ({"images": [{"path": "a.jpg", "bytes": None}]}, ("a.jpg",)),
        ({"image": "a.jpg", "key": "0001", "uid": "ab" * 16}, ("ab" * 16, "0001", "a.jpg")),
        ({"key": 17}, ("17",)),
        ({"images": ["a.jpg", "b.jpg"]}, ()),
        ({"image": None}, ()),
        ({"image": "x" * 10_000}, ()),
    ],
)
def test_names_of_the_image(tmp_path: Path, names: dict[str, Any], images: tuple[str, ...]) -> None:
    (record,) = read(lines(tmp_path / "a.jsonl", [{**names, **QUESTION}]))
    assert record.images == images


def test_one_question_a_row(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "question": "How many?", "options": ["1", "2"], "answer": "2", "kind": "counting"},
        {"image": "a.jpg", "question": "Where?", "options": ["left", "right"], "answer": "A", "kind": None},
    ]
    text = [{**row, "options": json.dumps(row["options"])} for row in rows]
    lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text("\ufeff \n" + json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    lines(tmp_path / "d.ndjson", text)
    with (tmp_path / "e.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(text)
    expected = [("How many?", ["1", "2"], 1, "count", "ok"), ("Where?", ["left", "right"], 0, "other", "ok")]
    fields = ("question", "options", "answer", "kind", "status")
    for path in sorted(tmp_path.iterdir()):
        got = [tuple(entry[field] for field in fields) for record in read(path) for entry in entries(record)]
        assert got == expected, path.name
    assert [r.where for r in read(tmp_path / "c.parquet")] == [f"{tmp_path}/c.parquet[{n}]" for n in (0, 1)]


def test_options_in_the_question_only_where_there_are_no_others(tmp_path: Path) -> None:
    text = "Which line is bold?\n- A) one\n- B) two"
    rows = [
        {"image": "a", **QUESTION, "question": text},
        {"image": "a", "question": text, "options": "", "answer": "B"},
    ]
    first, second = (entry for record in read(lines(tmp_path / "a.jsonl", rows)) for entry in entries(record))
    assert (first["question"], first["options"]) == (text, ["red", "blue"])
    assert (second["question"], second["options"]) == ("Which line is bold?", ["one", "two"])


def test_the_options_in_the_question_are_its_last_list(tmp_path: Path) -> None:
    text = "The sign says\nA. Smith\nand son. What are they?\n(A) Bakers\n(B) Tailors"
    entry = only(lines(tmp_path / "a.jsonl", [{"image": "a", "question": text, "answer": "B"}]))
    assert entry["question"] == "The sign says\nA. Smith\nand son. What are they?"
    assert (entry["options"], entry["answer"]) == (["Bakers", "Tailors"], 1)


def test_a_row_with_a_question_is_that_question(tmp_path: Path) -> None:
    row = {"image": "a", **QUESTION, "message": [{"role": "user", "content": "Look."}]}
    assert statuses(lines(tmp_path / "a.jsonl", [row])) == ["ok"]


def test_the_bytes_of_an_image_are_its_surest_name(tmp_path: Path) -> None:
    row = {"key": "7", "image": {"bytes": photo(2), "path": "a.jpg"}, **QUESTION}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (record,) = read(tmp_path / "a.parquet")
    assert record.images == (uid_of(photo(2)), "7", "a.jpg")


def test_a_folder_is_all_its_sets_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "b.jsonl", [{"image": "b", **QUESTION}])
    lines(tmp_path / "a.jsonl", [{"image": "a", **QUESTION}])
    (tmp_path / "README.md").write_text("questions")
    assert [record.images for record in read(tmp_path)] == [("a",), ("b",)]


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ({"image": str(n), **QUESTION} for n in range(3)))
    records = read_question_set(path)
    next(records)
    with Path(path).open("a") as file:
        file.write(json.dumps({"image": "later", **QUESTION}) + "\n")
    assert len(list(records)) == 3


# --- faults ----------------------------------------------------------------------------------------------------------


def test_bad_records_cost_nothing_but_themselves(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**QUESTION, "answer": "C"},
        {**QUESTION, "options": ["red"]},
        {**QUESTION, "options": ["red", "Red"]},
        {**QUESTION, "options": ["red", "blue", "both A and B"]},
        {**QUESTION, "options": "red or blue"},
        {**QUESTION, "options": None},
        {**QUESTION, "question": None},
        {"qa_list": []},
        {"qa_list": 3},
        {"qa_list": [3, ["a", "b", "c"], QUESTION]},
        {"question": "What?\n- A) red\nor\n- B) blue", "answer": "A"},
        {"question": "What?\n- A) red\n- B) blue\n- B) green", "answer": "B"},
        QUESTION,
    ]
    path = lines(tmp_path / "a.jsonl", [{"image": "a.jpg", **row} for row in rows])
    with Path(path).open("ab") as file:
        file.write(b'{"image": \n\xff\xfe\n\n[1]\n' + b"[" * 5000 + b"\n")
        file.write(b'{"image": "deep.jpg", "question": ' + b"[" * 900 + b"]" * 900 + b"}\n")
    bad = ["bad_answer", *["bad_options"] * 5, *["malformed"] * 5, "ok", "bad_options", "bad_options", "ok"]
    assert statuses(path) == [*bad, *["malformed"] * 5]
    records = read(path)
    assert all(json.loads(record.raw)["image"] == "a.jpg" for record in records[: len(rows)])
    assert records[-1].where.endswith(":19") and "nested too deeply" in str(records[-1].questions[0].fault)
    assert not records[-1].images and not records[-2].images


def test_uneven_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,question,options,answer\na,What?,"[""x"", ""y""]",x\nb,What?\n')
    assert statuses(tmp_path / "a.csv") == ["ok", "malformed"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "no record"),
        ("a.json", b"[]", "no record"),
        ("a.csv", b"image,question,options,answer\n", "no record"),
        ("a.json", b'[{"image": "a.jpg"', "cannot be read"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.parquet", b"PAR1 or not", "cannot be read"),
        ("a.jsonl", b'{"image": "a.jpg", "caption": "x"}\n', "no question set"),
        ("a.jsonl", b'{"question": "What?"}\n', "no question set"),
        ("a.json", b'{\n "image": "a.jpg",\n "caption": "What?"\n}\n', "no question set"),
        ("a.csv", b"path,caption\na.jpg,x\n", "no question set"),
        ("a.jpg", b"\xff\xd8\xff", "no question set"),
        ("a.jsonl", bytes(range(256)), "no question set"),
    ],
)
def test_what_is_no_question_set(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=reason) as caught:
        read_question_set(str(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, "nothing://x/y.jsonl"):
        with pytest.raises(BadInput, match=str(path)):
            read_question_set(str(path))


def test_an_empty_set_without_columns_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.string()), "question": []}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="no record"):
        read_question_set(str(tmp_path / "a.parquet"))


def test_damage_far_into_a_file(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg", **QUESTION, "kind": str(n) * 50} for n in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=200, compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data[middle : middle + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(data)
    records = read_question_set(str(tmp_path / "a.parquet"))
    with pytest.raises(BadInput, match=r"a\.parquet: cannot be read after record \d+"):
        list(records)


# --- images ----------------------------------------------------------------------------------------------------------


def record(*images: str, text: str = "What?", where: str = "") -> QuestionRecord:
    question = RawQuestion(text, ["x", "y"], "x")
    return QuestionRecord(images, (question,), json.dumps([*images, text]), where or f"set:{'+'.join(images)}")


UID = "0123456789abcdef" * 2
OTHER = "f" * 32


def asked(index: QuestionIndex, image: ImageNames) -> list[str] | None:
    found = index.lookup(image.uid, image.key, image.source)
    return None if found is None else [entry["question"] for entry in found.questions]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        (UID, ImageNames("000000001", "/data/a.jpg", UID)),
        ("000000001", ImageNames("000000001", "/data/a.jpg", UID)),
        ("/data/a.jpg", ImageNames("000000001", "/data/a.jpg", UID)),
        ("a.jpg", ImageNames("000000001", "/data/x/a.jpg", UID)),
        ("./x/a.jpg", ImageNames("000000001", "/data/x/a.jpg", UID)),
        ("x\\a.jpg", ImageNames("000000001", "/data/x/a.jpg", UID)),
        ("/elsewhere/a.jpg", ImageNames("000000001", "/data/x/a.jpg", UID)),
        ("s3://bucket/x/a.jpg", ImageNames("000000001", "x/a.jpg", UID)),
        ("/data/x/a.jpg", ImageNames("000000001", "x/a.jpg", UID)),
        ("a.jpg", ImageNames("000000001", "/data/00000.tar/a.jpg", UID)),
        ("images/a.jpg", ImageNames("images/a", None, UID)),
        ("/data/images/a.jpg", ImageNames("a", None, UID)),
        ("caf\udce9.jpg", ImageNames("000000001", "/data/caf\\udce9.jpg", UID)),
    ],
)
def test_an_image_is_found_by(name: str, image: ImageNames) -> None:
    other = ImageNames("000000002", "/data/y/b.jpg", OTHER)
    index = QuestionIndex([record(name)], [image, other])
    assert asked(index, image) == ["What?"]
    assert asked(index, other) is None
    assert index.unmatched() == []


@pytest.mark.parametrize(
    ("name", "image"),
    [
        (UID[:-1], ImageNames("000000001", "/data/a.jpg", UID)),
        ("/a.jpg", ImageNames("000000001", "/data/aa.jpg", UID)),
        ("a.png", ImageNames("000000001", "/data/a.jpg", UID)),
        ("000000001.jpg", ImageNames("000000001", "/data/a.jpg", UID)),  # another's file, not our key
    ],
)
def test_a_near_miss_is_none(name: str, image: ImageNames) -> None:
    index = QuestionIndex([record(name)], [image])
    assert asked(index, image) is None
    assert [u.reason for u in index.unmatched()] == ["no image of the shards has this name"]


def test_a_question_about_an_image_that_is_not_there(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", **QUESTION}, {"image": "gone.jpg", **QUESTION}, QUESTION]
    path = lines(tmp_path / "a.jsonl", rows)
    with Path(path).open("a") as file:
        file.write("{\n")
    index = QuestionIndex(read_question_set(path), [ImageNames("0", "a.jpg", UID)])
    assert asked(index, ImageNames("0", "a.jpg", UID)) == ["What color is the hat?"]
    gone, nameless, unread = index.unmatched()
    assert (gone.where, gone.image, gone.reason) == (f"{path}:2", "gone.jpg", "no image of the shards has this name")
    assert (nameless.where, nameless.image) == (f"{path}:3", "")
    assert "names no image" in nameless.reason
    assert unread.where == f"{path}:4" and "not JSON" in unread.reason


def test_records_of_one_image_are_joined_and_say_nothing_twice() -> None:
    records = [record("a.jpg"), record("b.jpg"), record(UID, text="Where?"), record("1", text="what? ")]
    index = QuestionIndex(records, [ImageNames("1", "a.jpg", UID)])
    found = index.lookup(UID, "1", "a.jpg")
    assert found is not None and found.error is None
    assert [(e["question"], e["status"]) for e in found.questions] == [
        ("What?", "ok"),
        ("Where?", "ok"),
        ("what?", "duplicate"),
    ]
    assert found.raw.splitlines() == [records[n].raw for n in (0, 2, 3)]


def test_a_file_name_that_two_images_have_is_refused() -> None:
    images = [ImageNames("1", "/x/a/1.jpg", UID), ImageNames("2", "/x/b/1.jpg", OTHER)]
    index = QuestionIndex([record("1.jpg", where="set:7"), record("b/1.jpg", text="Where?")], images)
    first, second = (index.lookup(i.uid, i.key, i.source) for i in images)
    assert first is not None and first.questions == []
    assert first.error is not None and "set:7" in first.error and "2 images" in first.error
    assert second is not None and [e["question"] for e in second.questions] == ["Where?"]
    assert second.error == first.error
    assert [u.where for u in index.unmatched()] == ["set:7"]


def test_a_file_name_that_the_set_has_in_two_folders_is_refused() -> None:
    image = ImageNames("1", "/x/a/1.jpg", UID)
    index = QuestionIndex([record("a/1.jpg"), record("b/1.jpg", text="Where?")], [image])
    assert asked(index, image) == ["What?"]
    assert [(u.image, "several files" in u.reason) for u in index.unmatched()] == [("b/1.jpg", True)]
    image = ImageNames("1", "/x/c/1.jpg", UID)
    index = QuestionIndex([record("a/1.jpg"), record("b/1.jpg", text="Where?")], [image])
    assert asked(index, image) == [] and len(index.unmatched()) == 2


def test_a_key_that_two_shards_have_is_refused() -> None:
    images = [ImageNames("0001", uid=UID), ImageNames("0001", uid=OTHER)]
    index = QuestionIndex([record("0001")], images)
    assert [asked(index, image) for image in images] == [[], []]
    assert len(QuestionIndex([record("0001")], [ImageNames("0001")] * 2).unmatched()) == 1


def test_the_surest_name_decides() -> None:
    images = [ImageNames("1", "/x/a.jpg", UID), ImageNames("a.jpg", "/x/b.jpg", OTHER)]
    index = QuestionIndex([record("a.jpg"), record(UID, "a.jpg", text="Where?")], images)
    assert [asked(index, image) for image in images] == [["Where?"], ["What?"]]


def test_copies_of_one_image_are_not_two_images() -> None:
    images = [ImageNames("1", "/x/a.jpg", UID), ImageNames("2", "/y/a.jpg", UID)]
    index = QuestionIndex([record("a.jpg")], images)
    assert [asked(index, image) for image in images] == [["What?"], ["What?"]]


def test_uids_need_not_be_known_beforehand() -> None:
    index = QuestionIndex([record(UID), record("a.jpg", text="Where?")], [ImageNames("a"), ImageNames("b")])
    assert len(index.unmatched()) == 1
    found = [asked(index, image) for image in (ImageNames("b", uid=UID), ImageNames("a", uid=OTHER))]
    assert found == [["What?"], ["Where?"]]
    assert index.unmatched() == []
