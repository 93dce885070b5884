"""A source that holds no image is refused, with what to do instead."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.stages.ingest.sources import open_sources

from ...conftest import photo, tar_bytes
from ..ingesting import fill, load, names

A = photo(1)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html><html>404 not found</html>"


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"image": [A]}), out)
    return out.getvalue()


def zip_bytes() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jpg", A)
    return out.getvalue()


def refused(*sources: object) -> str:
    with pytest.raises(BadInput) as raised:
        open_sources([str(source) for source in sources])
    return str(raised.value)


@pytest.mark.parametrize(
    ("files", "found", "hint"),
    [
        ({"README.md": b"# A set", "data/train.parquet": parquet_bytes()}, "a Parquet file", "hf://{root}"),
        ({"a/0.parquet": parquet_bytes(), "a/0_stats.json": b"{}"}, "a Parquet file", "hf://{root}"),
        ({"a.jpg": LFS, "b.jpg": LFS}, "of 2 items a Git LFS pointer (2)", "git lfs pull"),
        ({"images.zip": zip_bytes()}, "a zip archive", "unpack it first"),
        ({"images.gz": gzip.compress(b"x")}, "gzip data", "unpack it first"),
        ({"a/0.arrow": b"\xff\xff\xff\xff\x10\0\0\0"}, "Arrow data", "hf://{root}"),
        ({"a/0.tar": tar_bytes({"a.jpg": A})}, "a tar archive", "name the tars"),
        ({"a.jpg": PAGE}, "an HTML page", "download it again"),
        ({"notes.txt": b"notes"}, "plain text", "give a folder of images"),
        ({"list.json": b"[]"}, "JSON text", "give a folder of images"),
        ({"x.npy": b"\x93NUMPY\1\0"}, "unknown data", "give a folder of images"),
        ({}, "holds no image, it is empty", "give a folder of images"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path: Path, files: dict[str, bytes], found: str, hint: str) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    fill(root, files)
    message = refused(root)
    assert message.startswith(f"{root}: ") and found in message and hint.format(root=root) in message


def test_tars_and_tables_without_images_are_refused(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    texts = make_tar({"a.txt": b"a", "a.json": b"{}"})
    assert "no image with this key (txt, json)" in refused(texts)
    assert "an HTML page" in refused(make_tar({"a.jpg": PAGE}))
    (tmp_path / "page.tar").write_bytes(PAGE)
    assert "holds no image: an HTML page; a server sent a page" in refused(tmp_path / "page.tar")
    fill(tmp_path, {"list.csv": b"path\npage.tar\n", "empty.csv": b"path\n", "0.zip": zip_bytes()})
    assert "an HTML page" in refused(tmp_path / "list.csv")
    assert "it is empty" in refused(tmp_path / "empty.csv")
    assert "unpack it first" in refused(tmp_path / "0.zip")


@pytest.mark.parametrize("data", [b"GIF89a" + bytes(20), b"\0\0\0\x18ftypheic", b"", b"\xff\xd8\xff", bytes(99)])
def test_other_formats_and_damaged_images_are_rows(tmp_path: Path, data: bytes) -> None:
    assert len(load(fill(tmp_path / "photos", {"a.jpg": data}))) == 1


def test_one_image_among_other_things_is_enough(tmp_path: Path, make_tar: Callable[..., Path]) -> None:
    root = fill(tmp_path / "photos", {"a.zip": zip_bytes(), "b.txt": b"x", "c.jpg": A, "d.jpg": PAGE})
    assert names(load(root), root) == ["a.zip", "b.txt", "c.jpg", "d.jpg"]
    assert len(load(*sorted(root.iterdir()))) == 4  # as a shell writes photos/*
    one, other = make_tar({"a.txt": b"x"}, "in/0.tar"), make_tar({"a.jpg": A}, "in/1.tar")
    assert len(load(one, other)) == 2
    assert f"{one}: holds no image" in refused(one, root)


def test_what_cannot_be_read_is_not_called_no_image(tmp_path: Path) -> None:
    fill(tmp_path, {"list.csv": b"path\nmissing.jpg\n"})
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "pipes.csv").write_bytes(b"path\npipe.jpg\n")
    assert len(load(tmp_path / "list.csv")) == 1
    assert len(list(open_sources([str(tmp_path / "pipes.csv")]))) == 1


def test_an_artifact_without_images_is_told_from_a_data_set(tmp_path: Path) -> None:
    Artifact.create(str(tmp_path / "out"), "annotate", {}, {}).close()
    fill(tmp_path / "out", {"sub/00000.parquet": parquet_bytes()})
    assert "an artifact of capipe without images" in refused(tmp_path / "out")
