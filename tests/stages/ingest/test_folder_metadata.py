"""Captions of a folder's images from ImageFolder's metadata, and from named fields of their sidecars."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.stages.ingest.sources import open_sources

from ...conftest import photo
from ..ingesting import fill, lines, load, reasons

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


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


def test_the_caption_of_sidecars_by_name(tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    meta = {"re_caption": "anew", "caption": "old"}
    files = {
        "a.jpg": A,
        "a.json": json.dumps(meta).encode(),
        "a.txt": b"old",
        "b.png": B,
        "b.json": b"{}",
        "b.txt": b"b",
    }
    for source in (fill(tmp_path / "photos", files), make_tar(files)):
        first, second = load(source, text_column="re_caption")
        assert (first.text, first.meta, first.notes) == ("anew", {"caption": "old"}, [])
        assert (second.text, second.notes) == (None, ["no text in 're_caption' of its json"])
    root = folder_of(tmp_path, "jsonl")
    fill(root, {"a.txt": b"its own"})
    assert [item.text for item in load(root)] == ["its own", "meta 1", "meta 2"]
    assert [item.text for item in load(root, text_column="text")] == ["meta 0", "meta 1", "meta 2"]


def test_a_row_nested_too_deeply_costs_no_image(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "jsonl")
    deep = '{"file_name": "a.jpg", "x": ' + "[" * 900 + "]" * 900 + "}"
    (root / "metadata.jsonl").write_text(f'{deep}\n{{"file_name": "b.png", "text": "t"}}\n')
    items = load(root)
    assert [(item.data, item.text) for item in items[:3]] == [(A, None), (B, "t"), (C, None)]
    assert "the row is nested too deeply" in str(reasons(items)[3])


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
