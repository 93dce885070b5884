"""Every kind of source: what it yields, in which order, and what it refuses."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.status import Status
from capipe.stages.items import Handles, Item
from capipe.stages.sources import open_sources

from ..conftest import photo, tar_bytes
from .ingesting import fill, load

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


def names(items: list[Item], root: object = "") -> list[str]:
    return [item.source.removeprefix(f"{root}/" if root else "") for item in items]


def digests(*sources: object) -> list[str]:
    return [ref.identity() for ref in open_sources([str(source) for source in sources])]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_every_file_is_accounted_for(tmp_path: Path) -> None:
    root = fill(
        tmp_path / "photos",
        {
            "b.jpg": A,
            "b.txt": "schön".encode(),
            "b.json": b'{"url": "http://x/b", "n": 1}',
            "a/deep/c.png": B,
            "a/notes.txt": b"an orphan",
            "z.webp": C,
            "table.csv": b"x,y\n",
            "no_extension": A,
            ".hidden.jpg": A,
            ".git/objects/x.jpg": A,
        },
    )
    items = load(root)
    assert names(items, root) == ["b.jpg", "no_extension", "table.csv", "z.webp", "a/notes.txt", "a/deep/c.png"]
    first = items[0]
    assert (first.data, first.text, first.url) == (A, "schön", "http://x/b")
    assert first.meta == {"url": "http://x/b", "n": 1}
    assert items[4].data == b"an orphan" and items[5].data == B


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_folder_captions_by_any_usual_name(tmp_path: Path) -> None:
    root = fill(
        tmp_path / "photos",
        {
            "UPPER.JPG": A,
            "UPPER.TXT": b"UP",
            "UPPER.JSON": b'{"n": 1}',
            f"{NFC}.jpg": A,
            f"{NFD}.txt": b"of macOS",
            f"sub/{NFD}.png": B,
            f"sub/{NFC}.txt": b"of Linux",
            "kohya.webp": C,
            "kohya.caption": b"kohya's",
            "two.jpg": A,
            "two.caption": b"not taken, so a row",
            "two.txt": b"taken",
            "orphan.caption": b"of nothing",
            "readme.TXT": b"of nothing",
        },
    )
    items = load(root)
    texts = {item.source.removeprefix(f"{root}/"): item.text for item in items if item.problem is None}
    assert texts == {
        "UPPER.JPG": "UP",
        f"{NFC}.jpg": "of macOS",
        f"sub/{NFD}.png": "of Linux",
        "kohya.webp": "kohya's",
        "two.jpg": "taken",
        "two.caption": None,
        "orphan.caption": None,
        "readme.TXT": None,
    }
    assert next(item for item in items if item.text == "UP").meta == {"n": 1}
    alone = load(
        root / "UPPER.JPG", root / f"{NFC}.jpg", root / f"sub/{NFD}.png", root / "kohya.webp", root / "two.jpg"
    )
    assert [item.text for item in alone] == ["UP", "of macOS", "of Linux", "kohya's", "taken"]


def test_of_two_pictures_that_look_the_same_each_keeps_its_own_caption(tmp_path: Path) -> None:
    files = {f"{NFC}.jpg": A, f"{NFC}.txt": b"composed", f"{NFD}.jpg": B, f"{NFD}.txt": b"decomposed"}
    items = load(fill(tmp_path / "photos", files))
    assert {item.data: item.text for item in items} == {A: "composed", B: "decomposed"}


def test_an_unreadable_caption_is_a_row(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A})
    (root / "a.txt").symlink_to("nowhere.txt")
    first, second = load(root)
    assert (first.data, first.text) == (A, None)
    assert second.problem is not None and second.source.endswith("a.txt")


@pytest.mark.parametrize(
    ("written", "text", "notes"),
    [
        (b"\xef\xbb\xbfA cat.", "A cat.", []),
        ("A cät.".encode("utf-16"), "A cät.", []),
        (b"\xfe\xff" + "A cät.".encode("utf-16-be"), "A cät.", []),
        ("A cät.".encode("utf-32"), "A cät.", []),
        (b"caf\xe9", "caf\ufffd", ["text is not UTF-8: replaced"]),
        (b"\xff\xfeA\0b", "A\ufffd", ["text is not UTF-16: replaced"]),
    ],
    ids=["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "half a character"],
)
def test_encodings_of_captions(
    written: bytes, text: str, notes: list[str], tmp_path: Path, make_tar: Callable[..., Path]
) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A, "a.txt": written})
    for source in (root, root / "a.jpg", make_tar({"a.jpg": A, "a.txt": written})):
        (item,) = load(source)
        assert (item.text, item.notes) == (text, notes)


def test_metadata_that_is_not_utf8_is_replaced_and_named(tmp_path: Path) -> None:
    (item,) = load(fill(tmp_path / "photos", {"a.jpg": A, "a.json": b'{"caption": "caf\xe9"}'}))
    assert (item.text, item.notes) == ("caf\ufffd", ["json is not UTF-8: replaced"])


def test_folder_odd_entries(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A})
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "linked.jpg").symlink_to("a.jpg")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    items = {item.source.rpartition("/")[2]: item for item in load(root)}
    assert set(items) == {"a.jpg", "broken.jpg", "linked.jpg", "loop", "pipe.jpg"}
    assert items["linked.jpg"].data == A
    problems = {name: item.problem.status for name, item in items.items() if item.problem}
    assert problems == {"broken.jpg": Status.READ_ERROR, "loop": Status.UNSUPPORTED, "pipe.jpg": Status.UNSUPPORTED}


def test_folder_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / os.fsdecode(b"caf\xe9.jpg")).write_bytes(A)
    (item,) = load(root)
    assert item.data == A
    item.source.encode()  # printable, unlike the name


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A, "locked/b.jpg": B})
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    locked = load(root)[1]
    assert locked.problem is not None and "cannot be listed: Permission denied" in locked.problem.reason


def test_a_file_that_vanishes_after_listing(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A, "a.txt": b"text"})
    refs = list(open_sources([str(root)]))
    (root / "a.jpg").unlink()
    (root / "a.txt").unlink()
    item = refs[0].load(Handles())
    assert item.problem is not None and item.problem.status is Status.READ_ERROR
    assert "cannot be read: No such file" in item.problem.reason
    assert item.notes == ["txt cannot be read: No such file or directory"]


def test_single_files_and_several_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "photos", {"a.jpg": A, "a.txt": b"one", "b.png": B, "sub/c.webp": C})
    items = load(root / "b.png", root / "a.jpg", root / "sub")
    assert [item.data for item in items] == [B, A, C]
    assert items[1].text == "one"
    monkeypatch.chdir(root)
    assert names(load("a.jpg")) == ["a.jpg"]


def test_remote_folder(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name, data in {"x/a.jpg": A, "x/a.txt": b"one", "b.png": B, ".hid/c.jpg": C}.items():
        fs.pipe(f"/photos-{tmp_path.name}/{name}", data)
    items = load(f"memory://photos-{tmp_path.name}")
    assert [(item.data, item.text) for item in items] == [(B, None), (A, "one")]


def test_identity_follows_content_not_place(tmp_path: Path) -> None:
    files = {"a.jpg": A, "a.txt": b"one", "sub/b.png": B}
    here, there = fill(tmp_path / "here", files), fill(tmp_path / "elsewhere/there", files)
    assert digests(here) == digests(there)
    (there / "a.txt").write_bytes(b"other")
    assert digests(here)[0] != digests(there)[0] and digests(here)[1] == digests(there)[1]


# --- tars -------------------------------------------------------------------------------------------------------------


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


# --- tables -----------------------------------------------------------------------------------------------------------

ROWS = [
    {"file_name": "a.jpg", "caption": "one", "url": "http://x/a", "score": 0.5},
    {"file_name": "sub/b.png", "caption": None, "url": None, "score": float("nan")},
    {"file_name": "missing.jpg", "caption": "three", "url": None, "score": None},
    {"file_name": None, "caption": "four", "url": None, "score": 1.0},
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {"a.jpg": A, "sub/b.png": B})


def check_rows(items: list[Item]) -> None:
    assert [item.data for item in items] == [A, B, None, None]
    assert (items[0].text, items[0].url) == ("one", "http://x/a")
    assert [item.problem.reason if item.problem else None for item in items] == [
        None,
        None,
        "cannot be read: No such file or directory",
        "no path in column 'file_name'",
    ]


def test_parquet_of_paths(photos: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), photos / "list.parquet")
    items = load(photos / "list.parquet")
    check_rows(items)
    assert items[0].meta == {"url": "http://x/a", "score": 0.5}
    assert items[1].meta == {"caption": None, "url": None, "score": None}
    assert names(items, photos)[:2] == ["a.jpg", "sub/b.png"]


def test_jsonl_of_paths(photos: Path) -> None:
    lines = [json.dumps(row) for row in ROWS] + ["{broken", "[1, 2]", ""]
    (photos / "list.jsonl").write_text("\n".join(lines))
    items = load(photos / "list.jsonl")
    check_rows(items[:4])
    reasons = [item.problem.reason for item in items[4:] if item.problem]
    assert len(reasons) == 2 and "not JSON" in reasons[0] and "JSON list" in reasons[1]


@pytest.mark.parametrize(("extension", "comma"), [("csv", ","), ("tsv", "\t")])
def test_csv_of_paths(photos: Path, extension: str, comma: str) -> None:
    lines = [["file_name", "caption", "url"], ["a.jpg", '"one"', "http://x/a"], ["sub/b.png", "", ""]]
    lines += [["missing.jpg", "three", ""], ["", "four", ""], ["too", "many", "fields", "here"]]
    text = "\n".join(comma.join(line) for line in lines)
    (photos / f"list.{extension}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    items = load(photos / f"list.{extension}")
    check_rows(items[:4])
    assert items[4].problem is not None and "row has 4 fields" in items[4].problem.reason


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_tables_whose_text_is_not_utf8(photos: Path, extension: str) -> None:
    csv = b"file_name,caption,\xe9\na.jpg,caf\xe9,1\nsub/b.png,\xc3\xa9,2\n"
    jsonl = (
        b'{"file_name": "a.jpg", "caption": "caf\xe9", "\xe9": "1"}\n{"file_name": "sub/b.png", "caption": "\xc3\xa9"}'
    )
    (photos / f"list.{extension}").write_bytes(csv if extension == "csv" else jsonl)
    first, second = load(photos / f"list.{extension}")
    assert (first.data, first.text, first.notes) == (A, "caf\ufffd", ["text is not UTF-8: replaced"])
    assert (second.data, second.text, second.notes) == (B, "é", [])
    assert first.meta == {"\ufffd": "1"}


def test_tables_of_windows(photos: Path) -> None:
    text = "file_name,caption\r\na.jpg,schön\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (photos / "list.csv").write_bytes(text.encode(encoding))
        (item,) = load(photos / "list.csv")
        assert (item.data, item.text, item.notes) == (A, "schön", [])


def test_paths_that_are_not_utf8_name_their_files(photos: Path) -> None:
    (photos / os.fsdecode(b"caf\xe9.jpg")).write_bytes(C)
    (photos / "list.csv").write_bytes(b"file_name,caption\ncaf\xe9.jpg,one\n")
    (item,) = load(photos / "list.csv")
    assert (item.data, item.text) == (C, "one")


def test_table_columns(photos: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"where": [str(photos / "a.jpg")], "txt": ["t"]}), tmp_path / "list.parquet")
    with pytest.raises(BadInput, match=r"no column of paths.*--path-column.*where, txt"):
        load(tmp_path / "list.parquet")
    (item,) = load(tmp_path / "list.parquet", path_column="where")
    assert (item.data, item.text) == (A, "t")
    with pytest.raises(BadInput, match="no column 'nowhere'"):
        load(tmp_path / "list.parquet", path_column="nowhere")
    pq.write_table(pa.table({"url": ["http://x/a"]}), tmp_path / "urls.parquet")
    with pytest.raises(BadInput, match="img2dataset"):
        load(tmp_path / "urls.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        load(tmp_path / "broken.parquet")


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(photos: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(photos / "a.jpg"), str(photos / "sub/b.png")], "text": ["one", "two"], "n": [1, 2]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_saved_dataset(dataset: Any, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "saved")
    items = load(tmp_path / "saved")
    assert [(item.data, item.text, item.meta) for item in items] == [(A, "one", {"n": 1}), (B, "two", {"n": 2})]
    assert names(items)[1] == f"{tmp_path / 'saved'}:train[1]"


def test_saved_dataset_with_splits(dataset: Any, tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    both.save_to_disk(tmp_path / "saved")
    assert [item.data for item in load(tmp_path / "saved")] == [A, B, B]


def test_named_dataset(dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "named/data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "named/data/train-00000-of-00001.parquet")
    dataset.select([1]).to_parquet(tmp_path / "named/data/test-00000-of-00001.parquet")
    assert [item.data for item in load(f"hf://{tmp_path / 'named'}:test")] == [B]
    assert sorted(item.text or "" for item in load(f"hf://{tmp_path / 'named'}")) == ["one", "two", "two"]
    with pytest.raises(BadInput, match="no split 'dev'"):
        load(f"hf://{tmp_path / 'named'}:dev")
    with pytest.raises(BadInput, match="cannot be loaded as a dataset"):
        load("hf://no-such/dataset-anywhere")


def test_dataset_without_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match="no column of images"):
        load(tmp_path / "saved")


def test_what_is_no_source(tmp_path: Path) -> None:
    for source, reason in {
        "nowhere": "no such file",
        "*.jpg": "let the shell expand",
        "nosuch://x": "cannot be",
    }.items():
        with pytest.raises(BadInput, match=reason):
            load(source if "://" in source else tmp_path / source)


# --- sources without images -------------------------------------------------------------------------------------------

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
