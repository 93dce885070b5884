"""Captions appended to a Lance table: new columns by key and uid, and not a byte of the images moves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lance
import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.inspect.verify import verify
from capipe.stages.export.lance.schema import METADATA

from ...exporting import captions_of, export, final_shards, kept, rows_of, table_of, text_of, write_captions


def marks(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Inode, size, time and bytes of every file but the configuration's and the manifest's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "_capipe"]
    return {
        str(path.relative_to(folder)): (facts.st_ino, facts.st_size, facts.st_mtime_ns, path.read_bytes())
        for path in files
        if (facts := path.stat())
    }


def texts(out: Path, column: str) -> dict[str, str | None]:
    table = table_of(out)
    return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))


def append(source: Path, out: Path, *captions: object, **options: Any) -> None:
    assert export(source, out, "lance", captions=[str(each) for each in captions], **options) is not None


def test_columns_are_added_and_images_stay_where_they_are(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final", shards=3, empty=(1,), formats=("jpg", "png")), tmp_path / "out"
    export(source, out, "lance")
    before, rows = marks(out), table_of(out)
    captions = captions_of(source, tmp_path / "captions", prompts=("short", "dense"), failed=("000000002",))
    append(source, out, captions)
    after = marks(out)
    kept_files = {name: mark for name, mark in before.items() if after.get(name) == mark}
    parts = {f"_capipe/parts/0000{number}.json" for number in (0, 2)}
    assert before.keys() - kept_files.keys() == {"README.md", "croissant.json", *parts}
    added = {name for name in after if name not in before and name.startswith("train.lance/data/")}
    assert len(added) == 2 and all("-caption-" in name for name in added)
    table = table_of(out)
    assert table.schema.names == [*rows.schema.names, "caption_short", "caption_dense"]
    assert table.select(rows.schema.names).equals(rows)
    for name in ("short", "dense"):
        expected = {key: None if key == "000000002" else text_of(name, key) for key in kept(source)}
        assert texts(out, f"caption_{name}") == expected
    assert verify(str(out)).faults == []
    assert table_of(out, version=1).equals(rows)  # readers of the version before are not disturbed
    (about,) = json.loads(table.schema.metadata[METADATA])["appended"]
    assert about["columns"] == [["caption_short", "short"], ["caption_dense", "dense"]]
    assert about["model"] == "captioner"
    card = (out / "README.md").read_text()
    assert "## Further captions" in card and "`caption_dense`" in card and "Write a dense caption." in card


def test_the_same_again_changes_nothing_and_other_captions_stand_beside(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    one, two = captions_of(source, tmp_path / "one"), captions_of(source, tmp_path / "two", seed=1)
    append(source, out, one)  # also where there is no table yet
    before = marks(out)
    append(source, out, one)
    export(source, out, "lance")  # captions that are there stay
    assert marks(out) == before
    append(source, out, f"better={two}")
    assert texts(out, "caption_dense") == {key: text_of("dense", key) for key in kept(source)}
    assert texts(out, "better_dense") == {key: text_of("dense", key, 1) for key in kept(source)}
    append(source, tmp_path / "at-once", one, f"better={two}")
    assert table_of(tmp_path / "at-once").equals(table_of(out), check_metadata=True)
    assert verify(str(out)).faults == []


def test_several_samples_of_a_prompt(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final", shards=1), tmp_path / "out"
    append(source, out, captions_of(source, tmp_path / "captions", samples=2))
    assert texts(out, "caption_dense_1") == {key: text_of("dense#1", key) for key in kept(source)}


@pytest.mark.parametrize("size", [None, 5])
def test_captions_of_the_shards_before_the_selection(tmp_path: Path, size: int | None) -> None:
    """A final shard has rows of several shards, in which they may have had other keys."""
    source = final_shards(tmp_path / "final", origin=lambda shard, index: (f"{index % 3:05d}", f"{shard}-{index}"))
    shards: dict[str, list[tuple[str, str | None]]] = {f"{n:05d}": [("of another row", "0" * 32)] for n in range(4)}
    for row in rows_of(source):
        shards[row["source_shard"]].append((row["source_key"], row["uid"]))
    captions = captions_of(source, tmp_path / "captions", shards=shards, of="0" * 64)
    append(source, tmp_path / "out", captions, shard_size=size)
    expected = {key: text_of("dense", row["source_key"]) for key, row in kept(source).items()}
    assert texts(tmp_path / "out", "caption_dense") == expected


def test_shards_that_were_cut_or_merged(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final", shards=3)
    captions = captions_of(source, tmp_path / "captions")
    for size in (3, 100):
        append(source, tmp_path / str(size), captions, shard_size=size)
        assert texts(tmp_path / str(size), "caption_dense") == {key: text_of("dense", key) for key in kept(source)}


def test_captions_that_were_done_again_are_written_again_and_nothing_else(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    captions = captions_of(source, tmp_path / "captions", failed=("000010003",))
    append(source, out, captions)
    before = marks(out)
    artifact = Artifact.open(str(captions))
    artifact = Artifact.create(str(captions), "annotate", artifact.config["semantic"], artifact.config["run"])
    artifact.retract(artifact.committed()["00001"])
    rows = [(row["key"], row["uid"]) for row in Artifact.open(str(source)).read_rows("00001")]
    write_captions(artifact, "00001", rows, ("dense",))
    artifact.close()
    append(source, out, captions)
    assert texts(out, "caption_dense")["000010003"] == text_of("dense", "000010003")
    changed = {name for name, mark in marks(out).items() if before.get(name, mark)[3] != mark[3] or name not in before}
    data = {name for name in changed if name.startswith("train.lance/data/")}
    assert len(data) == 1 and "00001-caption-" in data.pop()
    assert verify(str(out)).faults == []
    assert len(list((out / "train.lance/_versions").iterdir())) == 1  # the version before names a file that is gone


def other_rows(row: Mapping[str, Any]) -> tuple[str, str | None]:
    return row["key"], "f" * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shards": {"00000": [("k", "0" * 32)]}},
            r"has no row for '000000000' of shard 00000 \(uid [0-9a-f]{32}\)",
        ),
        ({"shards": {"other": [("k", "0" * 32)]}}, "has no row for '000000000' of shard 00000"),
        ({"shards": other_rows}, r"'000000000' of shard 00000 is another image there \(f{32}, not [0-9a-f]{32}\)"),
        ({"total": 5}, "2 of 5 shards are committed; run `capipe annotate` to the end first"),
        (
            {"of": "0" * 64, "shards": {"x": [("k", None)]}},
            "captions of other shards than were exported; caption",
        ),
    ],
)
def test_captions_of_other_rows_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    export(source, out, "lance")
    before = marks(out)
    if callable(options.get("shards")):
        origin = Artifact.open(str(source))
        options = {"shards": {s: [options["shards"](row) for row in origin.read_rows(s)] for s in origin.committed()}}
    captions = captions_of(source, tmp_path / "captions", **options)
    with pytest.raises(BadInput, match=message):
        append(source, out, captions)
    assert marks(out) == before and verify(str(out)).faults == []


def test_unknown_rows_of_a_later_shard_end_the_run_and_harm_nothing(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    export(source, out, "lance")
    rows = table_of(out)
    known = [(row["key"], row["uid"]) for row in Artifact.open(str(source)).read_rows("00000")]
    captions = captions_of(source, tmp_path / "captions", shards={"00000": known, "00001": []})
    with pytest.raises(BadInput, match="has no row for '000010000' of shard 00001"):
        append(source, out, captions)
    assert table_of(out).equals(rows)
    append(source, out, captions_of(source, tmp_path / "right"))
    assert texts(out, "caption_dense") == {key: text_of("dense", key) for key in kept(source)}


def test_names_that_exist_and_what_has_no_captions(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final"), tmp_path / "out"
    one, two = captions_of(source, tmp_path / "one"), captions_of(source, tmp_path / "two", seed=1)
    append(source, out, one)
    with pytest.raises(BadInput, match=r"has columns of other captions under the name caption; .*NAME=.*/two"):
        append(source, out, two)
    with pytest.raises(BadInput, match="two sets named caption; name them"):
        append(source, tmp_path / "new", one, two)
    with pytest.raises(BadInput, match=r"the column re_caption of caption 'caption' is there already"):
        append(source, out, f"re={captions_of(source, tmp_path / 'three', prompts=('caption',))}")
    with pytest.raises(BadInput, match="an artifact of stage 'select' without captions; give one that"):
        append(source, out, f"x={source}")
    with pytest.raises(BadInput, match="not an artifact of capipe"):
        append(source, out, tmp_path / "nowhere")
    with pytest.raises(BadInput, match="--append-captions: columns are added to a table; use --format lance"):
        export(source, tmp_path / "tars", captions=[str(one)])
    assert verify(str(out)).faults == []


def test_a_withdrawal_needs_the_captions_and_takes_them_back_as_well(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final", shards=3), tmp_path / "out"
    captions = captions_of(source, tmp_path / "captions")
    append(source, out, captions)
    before, key = marks(out), "000010003"
    uid = kept(source)[key]["uid"]
    report = prove_absent(str(out), UidSet.of([uid]))
    assert any("train.lance/data/00001-" in fault and "embeds the image" in fault for fault in report.faults)
    with pytest.raises(BadInput, match="shards are to be written that have columns of the captions caption; give"):
        export(source, out, "lance", drop=UidSet.of([uid]))
    append(source, out, captions, drop=UidSet.of([uid]))
    assert prove_absent(str(out), UidSet.of([uid])).faults == [] and verify(str(out)).faults == []
    assert texts(out, "caption_dense") == {
        k: text_of("dense", k) for k, row in kept(source).items() if row["uid"] != uid
    }
    same = {name for name, mark in marks(out).items() if before.get(name) == mark and "train.lance/data/" in name}
    assert len(same) == 4 and not any("/00001-" in name for name in same)
    assert [entry["version"] for entry in lance.dataset(str(out / "train.lance")).versions()] == [2]
