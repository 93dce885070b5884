"""Tables, JSON files and Parquet with images in it: their layouts, and which column is what."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.status import Status
from capipe.stages import json_files
from capipe.stages.items import Handles
from capipe.stages.sources import open_sources

from ..conftest import photo
from .ingesting import fill, load

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {"a.jpg": A, "b.png": B, "sub/c.webp": C})


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reasons(items: list[Any]) -> list[str | None]:
    return [item.problem.reason if item.problem else None for item in items]


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


def test_lists_are_streamed(photos: Path) -> None:
    """A list that is broken far on gives all that is before."""
    with (photos / "long.json").open("w") as file:
        file.write("[" + '{"path": "a.jpg", "text": "t"},' * 200_000 + "broken")
    refs = open_sources([str(photos / "long.json")])
    assert sum(1 for _, ref in zip(range(100_000), refs, strict=False)) == 100_000
    with pytest.raises(BadInput, match="damaged after row 199999"):
        list(refs)


# --- images in Parquet -----------------------------------------------------------------------------------------------

KINDS = {
    "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "jpg": pa.binary(),
    "picture": pa.large_binary(),
    "images": pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "anything": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
}


def cell(column: str, data: bytes | None) -> Any:
    value = {"bytes": data, "path": "x.jpg" if data else None} if pa.types.is_nested(KINDS[column]) else data
    return [value] if column == "images" else value


def embedded(path: Path, column: str, images: list[bytes | None], **more: list[Any]) -> Path:
    cells = pa.array([cell(column, data) for data in images], KINDS[column])
    numbers = list(range(len(images)))
    pq.write_table(pa.table({column: cells, "n": numbers, **more}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("column", KINDS)
def test_images_in_parquet(tmp_path: Path, column: str) -> None:
    images = [A, B, None, C, A]
    table = embedded(tmp_path / "t.parquet", column, images, caption=[f"text {n}" for n in range(5)])
    items = load(table)
    assert [item.data for item in items] == images
    assert [item.text for item in items] == [f"text {n}" for n in range(5)]
    assert [item.meta for item in items] == [{"n": n} for n in range(5)]
    assert items[3].source == f"{table}[3]"
    assert reasons(items) == [None, None, f"no image in column {column!r}", None, None]
    assert [item.data for item in load(table, path_column=column)] == images
    assert load(table, text_column="caption")[0].text == "text 0"
    with pytest.raises(BadInput, match=r"no column 'title' for --text-column; its columns are .*caption"):
        load(table, text_column="title")


def test_images_of_another_column_in_parquet(tmp_path: Path, photos: Path) -> None:
    """The column that is asked for, also where another holds images; and what is bytes, but named like no image."""
    kind = KINDS["image"]
    both = pa.table({"image": pa.array([cell("image", A)], kind), "depth": pa.array([cell("image", B)], kind)})
    pq.write_table(both, tmp_path / "t.parquet")
    assert [item.data for item in load(tmp_path / "t.parquet")] == [A]
    assert [item.data for item in load(tmp_path / "t.parquet", path_column="depth")] == [B]
    pq.write_table(pa.table({"embedding": [b"\0\1"], "path": [str(photos / "a.jpg")]}), tmp_path / "u.parquet")
    assert [(item.data, item.meta) for item in load(tmp_path / "u.parquet")] == [(A, {})]


def test_paths_in_the_place_of_bytes(photos: Path) -> None:
    cells = pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "gone.jpg"}], KINDS["image"])
    pq.write_table(pa.table({"image": cells}), photos / "t.parquet")
    items = load(photos / "t.parquet")
    assert items[0].data == A and "cannot be read" in str(reasons(items)[1])


def test_several_images_in_a_row(tmp_path: Path) -> None:
    """the_cauldron and FineVision: rows of one image are pairs, those of more are not."""
    one, two = [{"bytes": A, "path": None}], [{"bytes": A, "path": None}, {"bytes": B, "path": None}]
    texts = [[{"user": "What?", "assistant": f"{n}", "source": "s"}] for n in range(3)]
    table = pa.table({"images": pa.array([one, two, []], KINDS["images"]), "texts": texts})
    pq.write_table(table, tmp_path / "t.parquet")
    items = load(tmp_path / "t.parquet")
    assert (items[0].data, items[0].text, items[0].meta) == (A, "0", {"texts": texts[0]})
    assert reasons(items)[1:] == [
        "2 images in column 'images'; a row is one image with its caption",
        "no image in column 'images'",
    ]


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"README.md": b"# data", "00000_stats.json": b"{}"})
    embedded(root / "train-00001.parquet", "jpg", [B])
    embedded(root / "train-00000.parquet", "jpg", [A])
    assert [item.data for item in load(root)] == [A, B]
    fill(root, {"loose.jpg": C})  # then it is a folder of images
    assert len(load(root)) == 5


def test_remote_parquet(tmp_path: Path) -> None:
    table = embedded(tmp_path / "t.parquet", "image", [A, B, C])
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/t.parquet", table.read_bytes())
    assert [item.data for item in load(f"memory://{tmp_path.name}/t.parquet")] == [A, B, C]


def test_a_row_is_told_from_another_by_what_it_holds(tmp_path: Path) -> None:
    def identities(images: list[bytes | None], text: str = "t") -> list[str]:
        table = embedded(tmp_path / "t.parquet", "image", images, text=[text] * len(images))
        return [ref.identity() for ref in open_sources([str(table)])]

    same = identities([A, B, C])
    assert same == identities([A, B, C]) and len(set(same)) == 3
    assert identities([A, C, C])[0] != same[0] and identities([A, C, C])[2] == same[2]  # a row group is one thing
    assert identities([A, B, C], "u")[2] != same[2]


def test_a_parquet_file_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    table = embedded(tmp_path / "t.parquet", "image", [A, B, C])
    refs = list(open_sources([str(table)]))
    embedded(table, "image", [A])
    with Handles() as handles:
        assert refs[0].load(handles).data == A
        with pytest.raises(OSError, match="did the file change"):
            refs[1].load(handles)
        assert refs[0].load(handles).data == A


# --- ImageFolder -----------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, kind: str) -> Path:
    root = fill(tmp_path / "imgfolder", {"a.jpg": A, "b.png": B, "sub/c.webp": C})
    rows = [{"file_name": name, "text": f"meta {n}", "n": n} for n, name in enumerate(["a.jpg", "b.png", "sub/c.webp"])]
    if kind == "jsonl":
        lines(root / "metadata.jsonl", rows)
    elif kind == "csv":
        said = [",".join(map(str, row.values())) for row in rows]
        (root / "metadata.csv").write_text("\n".join(["file_name,text,n", *said]) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    return root


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_image_folder_as_datasets_reads_it(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = folder_of(tmp_path, kind)
    ours = [(item.data, item.text) for item in load(root)]
    assert ours == [(A, "meta 0"), (B, "meta 1"), (C, "meta 2")]
    theirs = [(item.data, item.text) for item in load(f"hf://{root}")]
    assert sorted(theirs) == sorted(ours)
    assert load(root)[2].meta == {"n": "2" if kind == "csv" else 2}


def test_metadata_beside_the_images_goes_before_that_above(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "jsonl")
    lines(root / "sub/metadata.jsonl", [{"file_name": "c.webp", "text": "nearer", "title": "T"}])
    fill(root, {"a.txt": b"of its own", "b.json": b'{"n": 5, "url": "http://x/b"}', "d.jpg": A})
    items = {Path(item.source).name: item for item in load(root)}
    expected = {"a.jpg": "of its own", "b.png": "meta 1", "d.jpg": None, "c.webp": "nearer"}
    assert {name: item.text for name, item in items.items()} == expected
    assert (items["b.png"].meta, items["b.png"].url) == ({"n": 5, "url": "http://x/b"}, "http://x/b")


def test_rows_of_metadata_without_their_image(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", {unicodedata.normalize("NFD", "é.jpg"): A})
    rows: list[Any] = [{"file_name": "./é.jpg", "text": "t"}, {"file_name": "gone.jpg"}, {"file_name": None}, 3]
    rows += [{"file_name": "é.jpg", "text": "again"}]
    lines(root / "metadata.jsonl", rows)
    items = load(root)
    assert [(item.data, item.text) for item in items] == [(A, "t"), *[(None, None)] * 4]
    said = reasons(items)
    assert said[1] == "no path in column 'file_name'" and "JSON int" in str(said[2])
    assert "a row before it" in str(said[3]) and "No such file" in str(said[4])


def test_the_caption_of_metadata_by_name(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "jsonl")
    with pytest.raises(
        BadInput, match=r"metadata.jsonl: no column 'title' for --text-column; its columns are .*text, n"
    ):
        load(root, text_column="title")
    (root / "metadata.jsonl").unlink()
    fill(root, {"metadata.csv": b"name;size\na;1\n"})  # names no files: a file like any other
    assert [Path(item.source).name for item in load(root)] == ["a.jpg", "b.png", "metadata.csv", "c.webp"]


def test_image_folder_elsewhere(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    root = folder_of(tmp_path, "jsonl")
    for path in root.rglob("*.*"):
        fs.pipe(f"/{tmp_path.name}/{path.relative_to(root)}", path.read_bytes())
    items = load(f"memory://{tmp_path.name}")
    assert [(item.data, item.text) for item in items] == [(A, "meta 0"), (B, "meta 1"), (C, "meta 2")]


def test_a_changed_caption_is_another_item(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "jsonl")
    before = [ref.identity() for ref in open_sources([str(root)])]
    lines(
        root / "metadata.jsonl",
        [{"file_name": "a.jpg", "text": "other"}, {"file_name": "b.png", "text": "meta 1", "n": 1}],
    )
    after = [ref.identity() for ref in open_sources([str(root)])]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]


# --- datasets --------------------------------------------------------------------------------------------------------


def test_datasets_by_the_same_rules(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    features = datasets.Features({"images": datasets.Sequence(image), "title": datasets.Value("string")})
    cells = pa.array([[cell("image", A)], [cell("image", A), cell("image", B)]], KINDS["images"])
    pq.write_table(pa.table({"images": cells, "title": ["A title", "B"]}), tmp_path / "t.parquet")
    saved = datasets.Dataset.from_parquet(str(tmp_path / "t.parquet"), features=features, cache_dir=str(tmp_path / "c"))
    saved.save_to_disk(tmp_path / "saved")
    items = load(tmp_path / "saved", text_column="title")
    assert (items[0].data, items[0].text, items[0].meta) == (A, "A title", {})
    assert "2 images in column 'images'" in str(reasons(items)[1])
    assert [item.text for item in load(tmp_path / "saved")] == [None, None]
    with pytest.raises(BadInput, match="no column 'nothing' for --text-column; its columns are images, title"):
        load(tmp_path / "saved", text_column="nothing")
