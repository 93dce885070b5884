"""Tables of paths and JSON files: their layouts, and which column is what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.status import Status
from capipe.stages.ingest.sources import open_sources
from capipe.stages.reading import json_files

from ...conftest import photo
from ..ingesting import fill, lines, load, reasons, write

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {"a.jpg": A, "b.png": B, "sub/c.webp": C})


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["title", "re_caption", "vlm_caption", "prompt", "alt_text"])
def test_a_column_of_captions_by_name(photos: Path, name: str) -> None:
    row = {"file_name": "a.jpg", name: "A title", "caption": "another"}
    for table in (
        lines(photos / "t.jsonl", [row]),
        write(photos / "t.json", [row]),
        photos / "t.csv",
        photos / "t.parquet",
    ):
        if table.suffix == ".csv":
            table.write_text(f"file_name,{name},caption\na.jpg,A title,another\n")
        if table.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), table)
        (item,) = load(table, text_column=name)
        assert (item.data, item.text, item.meta) == (A, "A title", {"caption": "another"}), table
        (item,) = load(table)
        assert (item.text, item.meta) == ("another", {name: "A title"}), table
        with pytest.raises(BadInput, match=rf"no column 'nothing' for --text-column; its columns are .*{name}"):
            load(table, text_column="nothing")


def test_a_named_column_that_is_empty_is_no_other_column(photos: Path) -> None:
    rows = [
        {"path": "a.jpg", "title": None, "text": "t"},
        {"path": "a.jpg", "text": "t"},
        {"path": "a.jpg", "title": 3},
    ]
    assert [item.text for item in load(lines(photos / "t.jsonl", rows), text_column="title")] == [None] * 3


def test_a_list_of_captions(photos: Path) -> None:
    five = [f"caption {number}" for number in range(5)]
    rows = [
        {"image": "a.jpg", "caption": five},
        {"image": "b.png", "caption": []},
        {"image": "b.png", "caption": [3, "x"]},
    ]
    first, none, mixed = load(lines(photos / "t.jsonl", rows))
    assert (first.text, first.meta) == ("caption 0", {"caption": five})
    assert (none.text, mixed.text) == (None, "x")
    (item,) = load(lines(photos / "t.jsonl", [{"image": "a.jpg", "sentences": five}]), text_column="sentences")
    assert (item.text, item.meta) == ("caption 0", {"sentences": five})


def test_where_paths_begin(photos: Path, tmp_path: Path) -> None:
    table = lines(tmp_path / "t.jsonl", [{"path": "c.webp"}, {"path": str(photos / "a.jpg")}])
    items = load(table, image_folder=str(photos / "sub"))
    assert [item.data for item in items] == [C, A]
    with pytest.raises(BadInput, match=r"--image-folder .*nowhere: no such folder"):
        load(table, image_folder=str(photos / "nowhere"))


def test_a_row_nested_too_deeply_costs_itself_alone(photos: Path) -> None:
    deep = '{"path": "a.jpg", "x": ' + "[" * 900 + "]" * 900 + "}"
    (photos / "t.jsonl").write_text(f'{deep}\n{{"path": "b.png"}}\n')
    (photos / "t.json").write_text(f'[{deep}, {{"path": "b.png"}}]')
    for table in ("t.jsonl", "t.json"):
        items = load(photos / table)
        assert [item.data for item in items] == [None, B] and "nested too deeply" in str(reasons(items)[0])


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", "\t", ";"])
@pytest.mark.parametrize("wanted", [None, "filepath"])
def test_the_heading_tells_the_delimiter(photos: Path, mark: str, wanted: str | None) -> None:
    """OpenCLIP's own tables are tab-separated .csv with these columns."""
    captions = ["one, two, three; four", "no marks at all"]
    rows = [["filepath", "title"], ["a.jpg", f'"{captions[0]}"'], ["b.png", captions[1]]]
    (photos / "t.csv").write_text("\n".join(mark.join(row) for row in rows) + "\n\n")
    items = load(photos / "t.csv", path_column=wanted, text_column="title")
    assert [(item.data, item.text) for item in items] == list(zip([A, B], captions, strict=True))


def test_a_delimiter_in_the_name_of_a_column(photos: Path) -> None:
    (photos / "t.csv").write_text('path,"a;b;c;d",text\na.jpg,x,"t; u"\n')
    (item,) = load(photos / "t.csv")
    assert (item.text, item.meta) == ("t; u", {"a;b;c;d": "x"})


def test_long_fields_and_blank_lines(photos: Path) -> None:
    (photos / "t.csv").write_text(f"path,text,more\na.jpg,x,{'y' * 200_000}\n\n\r\nb.png,y,z\n\n")
    assert [(item.text, len(item.meta["more"])) for item in load(photos / "t.csv")] == [("x", 200_000), ("y", 1)]


# --- JSON files ------------------------------------------------------------------------------------------------------


def llava(image: str | None, answer: str, question: str = "<image>\nDescribe it.") -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": answer, **({"image": image} if image else {}), "conversations": turns}


def test_llava(photos: Path) -> None:
    rows = [
        llava("a.jpg", "a cat"),
        llava("sub/c.webp", "a dog"),
        llava(None, "words alone"),
        llava("no.jpg", "gone"),
        7,
    ]
    items = load(write(photos / "llava.json", rows))
    assert [(item.data, item.text) for item in items[:2]] == [(A, "a cat"), (C, "a dog")]
    assert items[0].meta == {name: value for name, value in rows[0].items() if name != "image"}  # type: ignore[union-attr]
    assert reasons(items)[2] == "no path in column 'image'" and reasons(items)[4] == "a JSON int, not an object"
    assert "No such file" in str(reasons(items)[3])
    assert [item.text for item in load(lines(photos / "llava.jsonl", rows[:2]))] == ["a cat", "a dog"]
    assert [item.text for item in load(lines(photos / "lines.json", rows[:2]))] == ["a cat", "a dog"]


def test_the_first_record_may_have_no_image(photos: Path) -> None:
    rows = [llava(None, "words alone"), llava("a.jpg", "a cat")]
    assert load(write(photos / "mix.json", rows))[1].data == A
    assert load(lines(photos / "mix.jsonl", rows))[1].data == A


def test_sharegpt_and_messages(photos: Path) -> None:
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Describe it."}]
    rows = [
        {"images": ["a.jpg"], "conversations": llava(None, "from gpt")["conversations"]},
        {"images": ["a.jpg"], "messages": [{"role": "system", "content": "Be kind."}, *openai("<image>", "said")]},
        {"images": ["a.jpg", "b.png"], "messages": openai("Compare.", "no caption")},
        {"images": ["a.jpg"], "texts": [{"user": "Describe it.", "assistant": "cauldron", "source": "x"}]},
    ]
    items = load(write(photos / "s.json", rows))
    assert [item.text for item in items] == ["from gpt", "said", None, "cauldron"]
    assert [item.data for item in items] == [A, A, None, A]
    problem = items[2].problem
    assert problem is not None and problem.status is Status.UNSUPPORTED and "2 images" in problem.reason
    (item,) = load(lines(photos / "m.jsonl", [{"messages": openai(parts, [{"type": "text", "text": "in parts"}])}]))
    assert (item.data, item.text) == (B, "in parts")


def openai(question: object, answer: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_coco_captions(photos: Path, tmp_path: Path) -> None:
    images = [
        {"id": 7, "file_name": "a.jpg", "width": 9},
        {"id": 8, "file_name": "b.png"},
        {"id": 9, "file_name": "x.jpg"},
    ]
    said = [(7, "one"), ("8", "three"), (7, "two"), (99, "of nothing")]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(said)]
    whole = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    for indent in (None, 2):
        path = tmp_path / f"captions{indent}.json"
        path.write_text(json.dumps(whole, indent=indent))
        first, second, gone, orphan = load(path, image_folder=str(photos))
        assert (first.data, first.text) == (A, "one")
        assert first.meta == {"id": 7, "width": 9, "captions": ["one", "two"]}
        assert (second.data, second.text) == (B, "three")
        assert gone.problem is not None and gone.text is None
        assert "id 99" in str(reasons([orphan])[0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a.jpg": {"caption": "of kohya"}}', "an object with 'a.jpg' in it"),
        (b'{\n "images": [],\n "annotations": []\n}', "'images', 'annotations'"),
        (b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}', "'annotations'"),
        (b"[]", "a list without objects"),
        (b'["a.jpg"]', "a list without objects"),
        (b"nonsense", "no JSON that can be read"),
        (b"", "no JSON that can be read"),
        (b'"a.jpg"', "no JSON that can be read"),
    ],
)
def test_json_that_is_no_source(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"x.json: no source capipe takes: ") as caught:
        load(tmp_path / "x.json")
    assert says in str(caught.value) and "LLaVA" in str(caught.value)


def test_broken_lists(photos: Path) -> None:
    whole = json.dumps([{"path": "a.jpg", "text": str(n)} for n in range(300)])
    (photos / "cut.json").write_text(whole[: len(whole) - 30])
    with pytest.raises(BadInput, match=r"cut.json: damaged after row 298"):
        load(photos / "cut.json")
    (photos / "cut.json").write_text("[{")
    with pytest.raises(BadInput, match=r"cut.json: cannot be read as json"):
        load(photos / "cut.json")
    with pytest.raises(BadInput, match="no column of paths"):
        load(write(photos / "x.json", [{"text": "no image"}]))


def test_one_object_is_one_row(photos: Path) -> None:
    assert [item.text for item in load(write(photos / "x.json", {"path": "a.jpg", "text": "t"}))] == ["t"]
    (photos / "big.json").write_text(json.dumps({"path": "a.jpg", "text": "t"}, indent=2))
    assert [item.text for item in load(photos / "big.json")] == ["t"]


def test_objects_held_in_memory_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_OBJECT_BYTES", 20)
    for text in ('{"path": "a.jpg", "text": "long"}', '{\n"path":\n"a.jpg", "text": "long"}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(BadInput, match=r"over 20, .*JSON lines"):
            load(tmp_path / "x.json")


def test_the_metadata_of_an_image_is_not_a_table(photos: Path) -> None:
    write(photos / "a.json", {"caption": "of a"})
    items = load(*sorted(path for path in photos.iterdir() if path.is_file()))
    assert [Path(item.source).name for item in items] == ["a.jpg", "a.json", "b.png"]
    assert (items[0].data, items[0].text) == (A, "of a")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_list_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int) -> None:
    values = [{"a": 'ü] ,"}'}, [1, [2]], "x, y", 1.5, -12, 1e9, None, True, {}, [], "\U0001f600"]
    monkeypatch.setattr(json_files, "_CHUNK", size)
    path = tmp_path / "x.json"
    for indent, mark in ((None, ""), (3, "\ufeff \n")):
        path.write_text(mark + json.dumps(values, indent=indent, ensure_ascii=False) + " \n", encoding="utf-8")
        with path.open("rb") as file:
            assert list(json_files.list_items(file)) == values
    for text in ("[1, 2", "[1 2]", "[1,]", "[1] 2", "[1]]", "", "{}", "[,1]"):
        path.write_text(text)
        with path.open("rb") as file, pytest.raises(ValueError):
            list(json_files.list_items(file))


@pytest.mark.slow
def test_lists_are_streamed(photos: Path) -> None:
    """A list that is broken far on gives all that is before."""
    with (photos / "long.json").open("w") as file:
        file.write("[" + '{"path": "a.jpg", "text": "t"},' * 200_000 + "broken")
    refs = open_sources([str(photos / "long.json")])
    assert sum(1 for _, ref in zip(range(100_000), refs, strict=False)) == 100_000
    with pytest.raises(BadInput, match="damaged after row 199999"):
        list(refs)
