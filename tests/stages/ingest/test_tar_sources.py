"""Tars as a source: their members joined to items by name, wherever they lie."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from capipe.errors import BadInput
from capipe.manifests.sidecars import MAX_BYTES
from capipe.manifests.status import Status
from capipe.stages.ingest.source_refs import Handles
from capipe.stages.ingest.sources import open_sources

from ...conftest import photo, tar_bytes
from ..ingesting import NFC, NFD, fill, load, names

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


def test_tar_layouts(make_tar: Callable[..., Path]) -> None:
    meta = json.dumps({"url": "http://x/1", "caption": "said", "width": 7}).encode()
    tar = make_tar(
        {
            "0001.jpg": A,
            "0001.txt": b"written",
            "0001.json": meta,
            "0002.json": meta,  # img2dataset without captions: the text is in the json
            "0002.png": B,
            "0003.txt": b"no image",
            "deep/er/0004.webp": C,
            "0005.jpg": A,
            "0005.npy": b"\x93NUMPY",
            "0006.bin": B,  # not named like an image, but one
        }
    )
    items = load(tar)
    expected = ["0001.jpg", "0002.png", "0003.txt", "deep/er/0004.webp", "0005.jpg", "0006.bin"]
    assert names(items, tar) == expected
    assert [item.data for item in items] == [A, B, None, C, A, B]
    assert [item.text for item in items] == ["written", "said", None, None, None, None]
    assert items[1].meta == {"url": "http://x/1", "caption": "said", "width": 7} and items[1].url == "http://x/1"
    assert items[2].problem is not None and items[2].problem.status is Status.UNSUPPORTED
    assert items[4].notes == ["members not kept: npy"]


def test_tar_captions_by_any_usual_name(make_tar: Callable[..., Path]) -> None:
    tar = make_tar(
        {
            "a.image.jpg": A,
            "a.caption.txt": b"C dotted",
            "b.jpg": B,
            "b.caption": b"kohya's",
            "b.cls": b"1",
            "c.jpg": C,
            "c.txt": b"the text",
            "c.caption.txt": b"another",
            "c.json": b"{}",
            "c.meta.json": b"{}",
            f"{NFC}.jpg": A,
            f"{NFD}.TXT": b"of macOS",
            "d.jpg": B,
            "d.meta.json": b'{"caption": "of meta"}',
        }
    )
    items = load(tar)
    assert [item.text for item in items] == ["C dotted", "kohya's", "the text", "of macOS", "of meta"]
    assert [item.notes for item in items] == [
        [],
        ["members not kept: cls"],
        ["members not kept: caption.txt, meta.json"],
        [],
        [],
    ]


def test_the_image_of_a_key_may_be_named(make_tar: Callable[..., Path]) -> None:
    tar = make_tar(
        {"0.jpg": A, "0.seg.png": B, "0.txt": b"0", "1.PNG": B, "1.mask.jpg": C, "1.txt": b"1", "2.seg.png": C}
    )
    assert [item.data for item in load(tar)] == [A, B, B, C, C]
    items = load(tar, image_key="jpg, .PNG")
    assert [(item.data, item.text) for item in items] == [(A, "0"), (B, "1"), (None, None)]
    assert [item.notes for item in items] == [["members not kept: seg.png"], ["members not kept: mask.jpg"], []]
    assert items[2].problem is not None and items[2].problem.status is Status.UNSUPPORTED
    assert "no member 'jpg, .PNG' with this key (seg.png)" in items[2].problem.reason
    assert [item.data for item in load(tar, image_key="seg.png")] == [B, None, C]


def test_tar_of_a_folder_in_any_order(make_tar: Callable[..., Path]) -> None:
    tar = make_tar(
        [("./p/a.txt", b"of a"), ("./p/b.jpg", B), ("./p/a.jpg", A), ("./p/b.txt", b"of b"), ("./q/a.jpg", C)]
    )
    assert [(item.data, item.text) for item in load(tar)] == [(A, "of a"), (B, "of b"), (C, None)]


def test_tar_with_repeated_keys_and_several_images(make_tar: Callable[..., Path]) -> None:
    tar = make_tar([("1.jpg", A), ("1.txt", b"first"), ("1.jpg", B), ("1.txt", b"second")])
    assert [(item.data, item.text) for item in load(tar)] == [(A, "first"), (B, "second")]
    tar = make_tar({"1.left.jpg": A, "1.right.jpg": B, "1.right.txt": b"right", "1.txt": b"both"}, "in/2.tar")
    assert [(item.data, item.text) for item in load(tar)] == [(A, "both"), (B, "right")]


def test_damaged_and_hostile_tars(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    tar = make_tar({"1.jpg": A, "../evil.jpg": B, "2.jpg": C}, "in/0.tar")
    whole = tar.read_bytes()
    (tmp_path / "in/1.tar").write_bytes(whole[: whole.rindex(C) + 100])
    (tmp_path / "in/2.tar").write_bytes(b"")
    items = load(tmp_path / "in")
    assert [item.data for item in items[:3]] == [A, None, C]
    assert items[1].problem is not None and "climbs out" in items[1].problem.reason
    assert items[3].data == A
    statuses = [item.problem.status for item in items[4:] if item.problem]
    assert statuses == [Status.UNSUPPORTED, Status.CORRUPT, Status.CORRUPT]


def test_a_tar_that_shrinks_after_its_index(make_tar: Callable[..., Path]) -> None:
    tar = make_tar({"1.jpg": A})
    (ref,) = open_sources([str(tar)])
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(OSError, match="did it change"):
        ref.load(Handles())


def test_tars_by_pattern_and_folder(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    for number, data in enumerate([A, B, C]):
        make_tar({f"{number}.jpg": data}, f"in/{number:05d}.tar")
    (tmp_path / "in/00000.parquet").write_bytes(b"beside the tars, as img2dataset writes it")
    for source in ("in", "in/*.tar", "in/{00000..00002}.tar"):
        assert [item.data for item in load(tmp_path / source)] == [A, B, C]
    with pytest.raises(BadInput, match="no such shard"):
        load(tmp_path / "in/{00000..00003}.tar")
    fill(tmp_path / "in", {"loose.jpg": A})
    with pytest.raises(BadInput, match="tars and loose images"):
        load(tmp_path / "in")


def test_compressed_tars_in_any_order(tmp_path: Path) -> None:
    whole = tar_bytes(
        [("a.txt", b"of a"), ("b.jpg", B), ("a.jpg", A), ("b.json", b'{"caption": "of b"}'), ("c.jpg", C)]
    )
    packed = {"1.tar.gz": gzip.compress(whole), "2.tgz": gzip.compress(whole), "3.tar": gzip.compress(whole)}
    root = fill(tmp_path / "in", {**packed, "4.tar.xz": lzma.compress(whole), "5.tar.gz": whole})
    expected = [(A, "of a"), (B, "of b"), (C, None)]
    for source in (root, *sorted(root.iterdir())):
        assert [(item.data, item.text) for item in load(source)] == expected * (5 if source == root else 1)


def test_a_damaged_compressed_tar_gives_what_is_whole(tmp_path: Path) -> None:
    packed = gzip.compress(tar_bytes({"a.jpg": A, "b.jpg": B}))
    items = load(fill(tmp_path, {"0.tar.gz": packed[:-1000]}) / "0.tar.gz")
    assert items[0].data == A
    assert items[-1].problem is not None and "gzip data is damaged" in items[-1].problem.reason


def test_remote_tar(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe(f"/tars-{tmp_path.name}/0.tar", tar_bytes({"a.jpg": A, "a.txt": b"one"}))
    (item,) = load(f"memory://tars-{tmp_path.name}/0.tar")
    assert (item.data, item.text) == (A, "one")


def test_a_sidecar_over_the_limit_is_left_out_unread_wherever_it_lies(
    make_tar: Callable[..., Path], tmp_path: Path
) -> None:
    files = {
        "a.jpg": A,
        "a.json": b'{"x": "' + b"x" * MAX_BYTES + b'"}',
        "a.txt": b"A dog.",
        "b.jpg": B,
        "b.txt": b"x" * 2**21,
    }
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(tar_bytes(files)))
    for source in (make_tar(files), packed, fill(tmp_path / "loose", files)):
        first, second = load(source)
        assert first.data == A and first.text == "A dog." and first.meta == {} and first.problem is None
        assert first.notes == [f"json of {len(files['a.json'])} bytes, over the limit of {MAX_BYTES}: left out"]
        assert second.data == B and second.text is None and len(second.notes) == 1
        assert "of 2097152 bytes, over the limit" in second.notes[0]
