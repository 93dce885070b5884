"""Croissant metadata of every export, as MLCommons' own library validates it and reads records by it."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from capipe.stages.export import croissant
from capipe.stages.export.card import CardWords, citation
from capipe.stages.export.formats import FORMATS

from ..exporting import captioned, croissant_of, export, final_shards, kept, rows_of

WORDS = CardWords("Scenes {of} all\nkinds", "cc-by-4.0", ("en",), ("Ada Example", "Bob"), "2026-11-30")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Final shards of jpg and png images in every format."""
    folder = tmp_path_factory.mktemp("exports")
    source = final_shards(folder / "final", formats=("jpg", "png"), meta=lambda index: {"url": f"http://host/{index}"})
    for format in FORMATS:
        export(source, folder / format, format, words=WORDS)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return croissant_of(tmp_path / "croissant", monkeypatch)


def text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


@pytest.mark.parametrize("format", list(FORMATS))
def test_it_is_valid_and_lists_what_is_there(exports: dict[str, Path], opened: Any, format: str) -> None:
    folder = exports[format]
    metadata = opened(folder).metadata
    assert not metadata.ctx.issues.errors
    assert metadata.name == WORDS.title and metadata.license == ["cc-by-4.0"] and metadata.cite_as == citation(WORDS)
    assert [creator.name for creator in metadata.creators] == ["Ada Example", "Bob"]
    assert f"{metadata.date_published:%Y-%m-%d}" == "2026-11-30"
    assert "16 pairs of image and caption in 2 shards" in metadata.description
    about = json.loads((folder / "croissant.json").read_bytes())
    objects = {node["@id"]: node for node in about["distribution"] if node["@type"] == "cr:FileObject"}
    assert {"00000.parquet", "00001.parquet", "README.md"} <= objects.keys()
    for name, node in objects.items():
        data = (folder / name).read_bytes()
        assert (node["sha256"], node["contentSize"]) == (hashlib.sha256(data).hexdigest(), f"{len(data)} B")
    loose = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - objects.keys()
    assert {name.split("/")[0] for name in loose} <= {"_capipe", "images", "croissant.json", "train.lance"}
    assert not any(name.startswith("train.lance/data") for name in loose)
    assert about["rai:dataPreprocessingProtocol"][0].startswith("select: final, fingerprint ")
    assert about["rai:machineAnnotationTools"] == ["clip"] and "/home" not in json.dumps(about)


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_row_is_read_by_it(exports: dict[str, Path], opened: Any, format: str) -> None:
    rows = list(opened(exports[format]).records("rows"))
    assert [text(row["rows/key"]) for row in rows] == [row["key"] for row in rows_of(exports["final"])]
    expected = {row["key"]: row["re_clip_score"] for row in rows_of(exports["final"])}
    assert {text(row["rows/key"]): row["rows/re_clip_score"] for row in rows} == pytest.approx(expected)


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((folder / "data").iterdir()) for row in pq.read_table(file).to_pylist()]


def stored_images(folder: Path) -> dict[str, bytes]:
    return {row["key"]: row["image"]["bytes"] for row in stored_rows(folder)}


def test_pairs_of_parquet_are_read_by_it(exports: dict[str, Path], opened: Any) -> None:
    records = list(opened(exports["parquet"]).records("pairs"))
    stored = [
        row
        for name in ("00000", "00001")
        for row in pq.read_table(exports["parquet"] / f"data/{name}.parquet").to_pylist()
    ]
    assert len(records) == len(stored) == 16
    for record, row in zip(records, stored, strict=True):
        assert text(record["pairs/key"]) == row["key"] and text(record["pairs/caption"]) == row["caption"]
        assert text(record["pairs/uid"]) == row["uid"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()[:32]
        assert record["pairs/re_clip_score"] == pytest.approx(row["re_clip_score"])
        assert record["pairs/image"].tobytes() == Image.open(BytesIO(row["image"]["bytes"])).tobytes()


def test_pairs_of_tars_are_read_by_it(exports: dict[str, Path], opened: Any) -> None:
    records = list(opened(exports["webdataset"]).records("pairs"))
    expected = {key: row["caption"] for key, row in kept(exports["final"]).items()}
    assert {text(record["pairs/key"]): text(record["pairs/caption"]) for record in records} == expected
    assert len(records) == 16
    images = {text(record["pairs/key"]): record["pairs/image"].tobytes() for record in records}
    stored = {key: Image.open(BytesIO(data)).tobytes() for key, data in stored_images(exports["parquet"]).items()}
    assert images == stored


def test_lists_of_structures_are_left_out(tmp_path: Path, opened: Any) -> None:
    source = captioned(tmp_path / "captions")
    export(source, tmp_path / "out", "parquet")
    names = {name.partition("/")[2] for name in next(iter(opened(tmp_path / "out").records("pairs")))}
    assert {"image", "caption", "key", "text"} <= names and "captions" not in names


def test_without_an_author_or_a_date_nothing_is_made_up(tmp_path: Path, opened: Any) -> None:
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", words=CardWords("Scenes", "other"))
    about = json.loads((tmp_path / "out/croissant.json").read_bytes())
    assert "creator" not in about and "datePublished" not in about
    assert about["citeAs"] == "@misc{scenes,\n  title = {Scenes},\n  note = {made with capipe}\n}"
    assert "## Citation" not in (tmp_path / "out/README.md").read_text()
    assert not opened(tmp_path / "out").metadata.ctx.issues.errors


def test_a_citation_is_one_entry_whatever_the_title(exports: dict[str, Path]) -> None:
    assert citation(WORDS) == (
        "@misc{scenes-of-all-kinds,\n  title = {Scenes of all kinds},\n  author = {Ada Example and Bob},\n"
        "  year = {2026},\n  note = {made with capipe}\n}"
    )
    assert citation(WORDS) in (exports["folder"] / "README.md").read_text()


def test_many_files_are_not_listed_one_by_one(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(croissant, "MOST_FILES", 5)
    source = final_shards(tmp_path / "final")
    export(source, tmp_path / "out", "parquet")
    about = json.loads((tmp_path / "out/croissant.json").read_bytes())
    assert {node["@type"] for node in about["distribution"]} == {"cr:FileSet"}
    assert len(list(opened(tmp_path / "out").records("pairs"))) == 16
