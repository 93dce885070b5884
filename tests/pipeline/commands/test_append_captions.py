"""`capipe export --format lance --append-captions` as people run it: killed, resumed, shared, refused in one line."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.inspect.verify import verify
from capipe.stages.export.card import CardWords

from ...stages.exporting import captions_of, export, final_shards, rows_of, table_of
from ..conftest import COMMAND, capipe, one_line
from ..withdrawing import contents, is_clean, killed_at_steps, listed, marks

WORDS = CardWords("t", "other")


def command(final: Path, captions: Path, *more: object) -> list[object]:
    words = ["export", final, "--format", "lance", "--title", "t", "--append-captions", captions]
    return [*words, *more]


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_it_ends_in_the_same_rows_and_no_image_moved(tmp_path: Path, stride: int) -> None:
    final = final_shards(tmp_path / "final", formats=("jpg", "png"))
    captions, before = captions_of(final, tmp_path / "captions"), tmp_path / "before"
    for out in (before, tmp_path / "alone"):
        export(final, out, "lance", words=WORDS)
    export(final, tmp_path / "alone", "lance", words=WORDS, captions=[str(captions)])
    images = {name: data for name, data in contents(before).items() if name.startswith("train.lance/data/")}
    killed = tmp_path / "killed"
    made = killed_at_steps(before, killed, *command(final, captions, "--workers", 0, "--out", killed), stride=stride)
    assert len(made) * stride >= 12
    for folder in made:
        assert table_of(folder).equals(table_of(tmp_path / "alone"), check_metadata=True)
        assert contents(folder) == contents(tmp_path / "alone") and contents(folder).items() >= images.items()
        assert verify(str(folder)).faults == []


@pytest.mark.slow
def test_killed_in_a_withdrawal_it_ends_in_the_same_rows(tmp_path: Path) -> None:
    final = final_shards(tmp_path / "final", shards=3)
    captions, before = captions_of(final, tmp_path / "captions"), tmp_path / "before"
    uids = [row["uid"] for row in Artifact.open(str(final)).read_rows("00001") if row["uid"]]
    for out in (before, tmp_path / "alone"):
        export(final, out, "lance", words=WORDS, captions=[str(captions)])
    export(final, tmp_path / "alone", "lance", words=WORDS, captions=[str(captions)], drop=UidSet.of(uids))
    drop, killed = listed(tmp_path / "uids.txt", uids), tmp_path / "killed"
    words = command(final, captions, "--workers", 0, "--drop", drop, "--out", killed)
    for folder in killed_at_steps(before, killed, *words):
        assert table_of(folder).equals(table_of(tmp_path / "alone"), check_metadata=True)
        assert contents(folder) == contents(tmp_path / "alone") and is_clean(folder, uids)


@pytest.mark.slow
def test_two_commands_share_the_work(tmp_path: Path) -> None:
    final = final_shards(tmp_path / "final", shards=12)
    captions = captions_of(final, tmp_path / "captions")
    capipe(*command(final, captions, "--out", tmp_path / "alone"))
    line = [*COMMAND, *map(str, command(final, captions, "--out", tmp_path / "out", "--share", "--workers", 1))]
    both = [subprocess.Popen(line, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(240) for process in both] == [0, 0]
    assert table_of(tmp_path / "out").equals(table_of(tmp_path / "alone"), check_metadata=True)
    assert verify(str(tmp_path / "out")).faults == []


def test_processes_write_the_columns_and_the_same_command_changes_nothing(tmp_path: Path) -> None:
    final = final_shards(tmp_path / "final", shards=4)
    captions, out = captions_of(final, tmp_path / "captions"), tmp_path / "out"
    done = capipe(*command(final, captions, "--workers", 2, "--out", out))
    assert "4/4 shards committed" in done.stdout
    assert table_of(out)["caption_dense"].null_count == 0 and table_of(out).num_rows == 32
    before = marks(out)
    capipe(*command(final, captions, "--workers", 0, "--out", out))
    assert marks(out) == before and verify(str(out)).faults == []


def test_a_bucket_holds_a_table_with_appended_captions(tmp_path: Path, s3: str) -> None:
    final = final_shards(tmp_path / "final")
    captions, out = captions_of(final, tmp_path / "captions"), f"{s3}/append"
    export(final, out, "lance", words=WORDS)
    folder = Artifact.open(out).folder
    images = {name: folder.marks("train.lance/data")[name] for name in folder.names("train.lance/data")}
    export(final, out, "lance", words=WORDS, captions=[str(captions)])
    assert folder.marks("train.lance/data").items() >= images.items()
    export(final, tmp_path / "alone", "lance", words=WORDS, captions=[str(captions)])
    copied(folder, "train.lance", tmp_path / "copy")
    assert table_of(tmp_path / "copy").equals(table_of(tmp_path / "alone"), check_metadata=True)
    assert verify(out).faults == []
    gone = [next(row["uid"] for row in rows_of(final) if row["status"] == "ok")]
    export(final, out, "lance", words=WORDS, captions=[str(captions)], drop=UidSet.of(gone))
    assert is_clean(out, gone) and len(folder.names("train.lance/data")) == 4


def copied(folder: Any, name: str, to: Path) -> None:
    """Copy a folder of a bucket."""
    for path in folder.fs.find(folder.full(name)):
        target = to / str(path).partition(f"/{folder.path.rpartition('/')[2]}/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(folder.fs.read(path))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--format", "parquet"],
            "--append-captions: columns are added to a table; use --format lance",
        ),
        (["--append-captions", "final"], "--append-captions final: an artifact of stage 'select' without captions"),
        (["--published", "yesterday"], "--published 'yesterday': write a date as YYYY-MM-DD"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    final = final_shards(Path("final"))
    captions = captions_of(final, Path("captions"))
    assert said in one_line(capipe(*command(final, captions, "--out", "out", *more), code=2))
    assert not Path("out").exists()
