"""Ingest of tars as they come: compressed, with masks beside images, and of what holds no image at all."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.manifests.verify import verify

from ...conftest import photo, tar_bytes
from ..ingesting import ingest, members, rows


def test_a_compressed_tar_gives_the_bytes_of_a_plain_one(tmp_path: Path) -> None:
    files = {f"{n:03d}.{ext}": data for n in range(30) for ext, data in {"jpg": photo(n), "txt": b"t%d" % n}.items()}
    files["000.caption.txt"] = b"another"
    whole = tar_bytes(files)
    for name, data in {"plain/0.tar": whole, "packed/0.tar": gzip.compress(whole)}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    ingest(tmp_path / "plain/0.tar", out=tmp_path / "one", shard_size=7)
    ingest(tmp_path / "packed/0.tar", out=tmp_path / "two", shard_size=7, workers=2)
    found = rows(tmp_path / "two")
    assert [row["text"] for row in found] == [f"t{n}" for n in range(30)]
    assert found[0]["error"] == "members not kept: caption.txt" and found[1]["error"] is None
    images = {name: data for name, data in members(tmp_path / "two").items() if name.endswith("jpg")}
    assert list(images.values()) == [photo(n) for n in range(30)]
    assert images == {name: data for name, data in members(tmp_path / "one").items() if name.endswith("jpg")}
    assert verify(str(tmp_path / "two")).faults == []
    assert ingest(tmp_path / "packed/0.tar", out=tmp_path / "two", shard_size=7) == []  # all is done


def test_masks_are_left_out_by_the_images_name(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_tar({"0.jpg": photo(0), "0.seg.png": photo(1, fmt="PNG"), "0.txt": b"zero", "1.seg.png": b"x"})
    ingest(tar, out=tmp_path / "out", image_key="jpg")
    first, second = rows(tmp_path / "out")
    assert (first["status"], first["text"], first["error"]) == ("ok", "zero", "members not kept: seg.png")
    assert second["status"] == "unsupported" and "no member 'jpg' with this key (seg.png)" in second["error"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_source_without_images_harms_nothing(tmp_path: Path, fresh: bool) -> None:
    out, source = tmp_path / "out", tmp_path / "photos"
    source.mkdir()
    (source / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(BadInput, match="holds no image: an HTML page"):
        ingest(source, out=out, fresh=fresh)
    assert not out.exists()
    (source / "a.jpg").write_bytes(photo(0))
    ingest(source, out=out)
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (source / "a.jpg").unlink()  # a share that is not mounted, a folder that was emptied
    with pytest.raises(BadInput, match="holds no image"):
        ingest(source, out=out, fresh=fresh)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == written
