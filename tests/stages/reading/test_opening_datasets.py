"""What data may name, continued: data sets, their cards, and folders of question sets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.stages.ingest.sources import open_sources
from capipe.stages.questions.import_sets import read_question_set

from ..hostile import A, Pictures, hostile, reach
from ..ingesting import fill, lines, load, write

# --- data sets -------------------------------------------------------------------------------------------------------


def saved(folder: Path, named: list[str]) -> Path:
    cells = [{"bytes": None, "path": name} for name in named]
    table = {"image": cells, "mask": cells, "n": list(range(len(cells)))}
    cell = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": cell, "mask": cell, "n": datasets.Value("int64")})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder))
    info = json.loads((folder / "dataset_info.json").read_text())  # `save_to_disk` itself opens the paths of images
    info["features"] |= {name: {"_type": "Image"} for name in ("image", "mask")}
    write(folder / "dataset_info.json", info)
    return folder


def test_paths_in_a_saved_dataset(tmp_path: Path, server: str) -> None:
    """Those of its images go through the door, and no other column opens any."""
    folder = fill(tmp_path / "list", {"a.jpg": A})
    bad = {name: said for name, said in hostile(folder, server).items() if name.startswith(("/", "ref", "zip", "ftp"))}
    source = saved(tmp_path / "saved", [str(folder / "a.jpg"), *bad, f"{server}/a.jpg"])
    items = load(source)
    assert [item.data for item in items] == [A, *[None] * len(bad), A]
    for item, said in zip(items[1:-1], bad.values(), strict=True):
        assert item.problem is not None and item.problem.status.value == "unsupported" and said in item.problem.reason
    assert Pictures.seen == ["/a.jpg"] and [item.meta["n"] for item in items] == list(range(len(items)))
    bound = load(source, reach=reach(folder))
    assert [item.data for item in bound] == [A, *[None] * (len(bad) + 1)]


@pytest.mark.parametrize("what", ["outside", "pipe", "link", "splits"])
def test_files_that_a_saved_dataset_names(tmp_path: Path, what: str) -> None:
    fill(tmp_path, {"a.jpg": A})
    source = saved(tmp_path / "saved", [str(tmp_path / "a.jpg")])
    state = json.loads((source / "state.json").read_text())
    file = source / state["_data_files"][0]["filename"]
    if what == "outside":
        file.rename(tmp_path / "data.arrow")
        write(source / "state.json", {**state, "_data_files": [{"filename": "../data.arrow"}]})
    elif what == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif what == "link":
        file.rename(tmp_path / "data.arrow")
        file.symlink_to(tmp_path / "data.arrow")
        assert [item.data for item in load(source, follow_links=True)] == [A]
    else:
        write(source / "dataset_dict.json", {"splits": ["../saved"]})
    with pytest.raises(BadInput, match=r"climbs out of its folder|not a regular file|leads out of its source"):
        list(open_sources([str(source)]))


@pytest.mark.parametrize(
    "named",
    [
        "reference://k::{server}/evil.json",
        "zip://*.jpg::{server}/a.zip",
        "{server}/a.parquet",
        "https://example.org/a.parquet",
        "/etc/passwd",
        "../home/a.parquet",
        "data/../../home/*.parquet",
    ],
)
@pytest.mark.parametrize("form", ["text", "list", "splits"])
def test_data_files_that_a_datasets_card_names(tmp_path: Path, server: str, named: str, form: str) -> None:
    """Refused before `datasets` opens one."""
    name = named.format(server=server)
    files = {
        "text": name,
        "list": ["data/a.parquet", name],
        "splits": [{"split": "train", "path": ["a.parquet", name]}],
    }
    card = {"configs": [{"config_name": "default", "data_files": files[form]}]}
    in_front = f"---\n{json.dumps(card)}\n---\n# A set"
    for place, text in {"README.md": in_front, ".huggingface.yaml": json.dumps(card)}.items():
        root = fill(tmp_path / place / "set", {place: text.encode()})
        with pytest.raises(BadInput, match="its card names data files elsewhere"):
            load(f"hf://{root}")
    assert Pictures.seen == []


def test_a_datasets_card_that_names_its_own_files(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", {"README.md": b"---\nconfigs: [{config_name: default, data_files: data/*}]\n---\n"})
    (root / "data").mkdir()
    pq.write_table(pa.table({"image": [A]}), root / "data/a.parquet")
    assert [item.data for item in load(f"hf://{root}")] == [A]


# --- question sets ---------------------------------------------------------------------------------------------------


def test_a_folder_of_question_sets(tmp_path: Path, elsewhere: Path) -> None:
    asked = {"key": "k", "question": "What?", "A": "x", "B": "y", "answer": "A"}
    root = tmp_path / "sets"
    root.mkdir()
    lines(root / "a.jsonl", [asked])
    (root / "b.jsonl").symlink_to("a.jsonl")
    assert len(list(read_question_set(str(root)))) == 2
    lines(elsewhere / "private.jsonl", [asked])
    (root / "c.jsonl").symlink_to(elsewhere / "private.jsonl")
    with pytest.raises(BadInput, match=r"c\.jsonl: a link that leads out of .*sets; name the files themselves"):
        read_question_set(str(root))
    assert len(list(read_question_set(str(root / "c.jsonl")))) == 1
    (root / "c.jsonl").unlink()
    os.mkfifo(root / "d.json")
    with pytest.raises(BadInput, match=r"d\.json: not a regular file .*; move it elsewhere"):
        read_question_set(str(root))
