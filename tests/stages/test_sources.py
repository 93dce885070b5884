"""Every kind of source: what it yields, in which order, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.status import Status
from capipe.stages.items import Handles, Item
from capipe.stages.sources import open_sources

from ..conftest import photo, tar_bytes

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


def load(*sources: object, path_column: str | None = None) -> list[Item]:
    """The items as a worker gets them: references pickled, then loaded."""
    refs = pickle.loads(pickle.dumps(list(open_sources([str(source) for source in sources], path_column))))
    with Handles() as handles:
        items = [ref.load(handles) for ref in refs]
    assert [item.source for item in items] == [ref.source for ref in refs]
    return items


def names(items: list[Item], root: object = "") -> list[str]:
    return [item.source.removeprefix(f"{root}/" if root else "") for item in items]


def digests(*sources: object) -> list[str]:
    return [ref.identity() for ref in open_sources([str(source) for source in sources])]


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


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
    pq.write_table(pa.table({"image": [{"bytes": A, "path": None}]}), tmp_path / "embedded.parquet")
    with pytest.raises(BadInput, match=r"holds images, not paths.*hf://"):
        load(tmp_path / "embedded.parquet")
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
