"""Every kind of source: what it yields, in which order, and what it refuses."""

from __future__ import annotations

import json
import os
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
from capipe.pipeline.jobs.ingest import plan_ingest
from capipe.stages.ingest.shard import IngestConfig
from capipe.stages.ingest.source_refs import Handles, Item
from capipe.stages.ingest.sources import open_sources

from ...conftest import photo
from ..ingesting import NFC, NFD, fill, load, names

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")


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


def test_a_revision_of_a_named_dataset(dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as a model's is, asked for once in a process, and the commit that it was is on record."""
    import datasets

    from capipe.stages.ingest import huggingface

    commit, asked = "0123456789" * 4, list[tuple[str, str | None]]()

    def load_dataset(name: str, revision: str | None = None) -> Any:
        """Files where `datasets` puts those of the hub: in a folder named after the commit."""
        asked.append((name, revision))
        place = tmp_path / f"cache/org___name/default/0.0.0/{commit}"
        dataset.save_to_disk(place)
        return datasets.DatasetDict({"train": datasets.load_from_disk(place)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface, "_LOADED", {})
    for src in ("hf://org/name@v1.0/x:train", "hf://org/name@v1.0/x:train", "hf://org/name", "hf://name@main"):
        items = load(src)
        assert [item.data for item in items] == [A, B]
        assert names(items)[0] == f"{src.removesuffix(':train')}:train[0]"
    assert asked == [("org/name", "v1.0/x"), ("org/name", None), ("name", "main")]
    assert huggingface.commits() == dict.fromkeys(("hf://org/name@v1.0/x", "hf://org/name", "hf://name@main"), commit)

    made = plan_ingest(["hf://org/name@v1.0/x"], str(tmp_path / "out"), IngestConfig(), workers=0)
    made.artifact.close()
    assert Artifact.open(str(tmp_path / "out")).config["run"]["commits"]["hf://org/name@v1.0/x"] == commit


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
