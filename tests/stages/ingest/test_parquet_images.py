"""Images in Parquet files and data sets: their columns, and what a worker reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.stages.ingest.source_refs import Handles
from capipe.stages.ingest.sources import open_sources

from ...conftest import photo
from ..ingesting import fill, load, reasons

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {"a.jpg": A, "b.png": B, "sub/c.webp": C})


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


def test_a_folder_of_folders_and_parquet_is_one_of_images(photos: Path) -> None:
    embedded(photos / "index.parquet", "jpg", [C])
    for name in ("a.jpg", "b.png"):
        (photos / name).unlink()
    assert [Path(item.source).name for item in load(photos)] == ["index.parquet", "c.webp"]


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
