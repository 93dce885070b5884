"""Withdrawal from an exported set: the shards touched are rewritten, the others are not, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.inspect.verify import verify
from capipe.stages.export.card import CardWords
from capipe.stages.export.formats import FORMATS

from ...stages.exporting import captioned, export, final_shards, kept, rows_of
from ..conftest import capipe, one_line
from ..withdrawing import UNKNOWN, contents, is_clean, killed_at_steps, listed, marks, touched

CASES = [(name, size) for name in FORMATS for size in (None, 5)]


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return final_shards(tmp_path_factory.mktemp("final") / "final", shards=4, formats=("jpg", "png"))


def some(final: Path) -> list[str]:
    """Uids of two pairs, one in the first shard and one in the last, and of a row that was filtered out there."""
    rows = rows_of(final)
    pairs = [row["uid"] for row in rows if row["status"] == "ok"]
    return [pairs[1], pairs[-1], next(row["uid"] for row in rows[-12:] if row["status"] == "filtered")]


@pytest.mark.parametrize(("format", "size"), CASES)
def test_only_the_shards_touched_are_rewritten(final: Path, tmp_path: Path, format: str, size: int | None) -> None:
    uids, out = some(final), tmp_path / "out"
    export(final, out, format, shard_size=size)
    report = prove_absent(str(out), UidSet.of(uids))
    assert len(report.faults) + report.more >= 3 and report.rows == 0  # it finds what is there
    before, artifact = marks(out), Artifact.open(str(out))
    theirs = {shard for shard in artifact.committed() for row in artifact.read_rows(shard) if row["uid"] in uids}
    notes = export(final, out, format, shard_size=size, drop=UidSet.of(uids)) or []
    (note,) = [line for line in notes if "withdrawn" in line]
    assert note == "3 rows are withdrawn: of these images the uid alone is left."
    assert touched(before, marks(out)) == theirs and 2 <= len(theirs) < len(artifact.committed())
    assert is_clean(out, uids)
    gone = [row for row in rows_of(out) if row["uid"] in uids]
    assert len(gone) == 3 and {row["status"] for row in gone} == {"withdrawn"}
    assert all(row["key"] and row["caption"] is None and row["re_caption"] is None for row in gone)
    assert [(row["key"], row["uid"]) for row in rows_of(out)] == [(row["key"], row["uid"]) for row in rows_of(final)]
    card = (out / "README.md").read_text()
    assert "3 rows are withdrawn" in card and "| `withdrawn` | 3 | 6.2% |" in card
    export(final, tmp_path / "anew", format, shard_size=size, drop=UidSet.of(uids))
    assert contents(out) == contents(tmp_path / "anew")


def test_a_list_may_grow_and_never_shrinks(final: Path, tmp_path: Path) -> None:
    uids, out = some(final), tmp_path / "out"
    export(final, out, drop=UidSet.of(uids[:1], "one.txt"))
    with pytest.raises(BadInput, match=f"two.txt: lacks 1 of the 1 uids that {out} was made with .*; add them, or use"):
        export(final, out, drop=UidSet.of(uids[1:], "two.txt"))
    with pytest.raises(BadInput, match="made with --drop, of 1 uids; give that list, or a longer one, or --fresh"):
        export(final, out)
    assert is_clean(out, uids[:1])
    before = marks(out)
    export(final, out, drop=UidSet.of(uids))
    assert touched(before, marks(out)) == {"00003"} and is_clean(out, uids)
    export(final, out, fresh=True)
    assert contents(out) == contents(exported(final, tmp_path / "plain"))


def exported(final: Path, out: Path) -> Path:
    export(final, out)
    return out


def test_the_command_counts_what_it_did_not_find(final: Path, tmp_path: Path) -> None:
    """Unknown uids, another case, blank lines; the same list again costs nothing; then the proof."""
    uids, out, drop = some(final), tmp_path / "out", tmp_path / "uids.txt"
    command = ["export", final, "--out", out, "--format", "webdataset", "--image-extension", "keep", "--workers", 0]
    capipe(*command)
    absent = ["verify", out, "--absent", drop]
    listed(drop, ["", uids[0].upper(), UNKNOWN, "", uids[0], uids[1]])
    assert "fault: " in capipe(*absent, code=1).stdout
    done = capipe(*command, "--drop", drop)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("withdrawn: ")]
    assert line == f"withdrawn: 2 rows, by 2 of the 3 uids in {drop}; 1 are of no image here"
    assert "2 withdrawn" in done.stdout
    before = marks(out)
    listed(drop, [uids[1], UNKNOWN, uids[0]])
    capipe(*command, "--drop", drop)
    assert not touched(before, marks(out))
    assert f"absent; 3 uids in {drop}; " in capipe(*absent).stdout
    listed(drop, [uids[0], "nonsense"])
    text = f"{drop}: line 2 is no uid ('nonsense'); a uid is the first 32 hex digits"
    assert text in one_line(capipe(*command, "--drop", drop, code=2))
    assert text in one_line(capipe(*absent, code=2))


def test_all_of_a_shard_and_all_there_is(final: Path, tmp_path: Path) -> None:
    """A shard that has no pair any more has no tar, and no file that nobody lists is left; then there is no pair."""
    out = exported(final, tmp_path / "out")
    first = [row["uid"] for row in Artifact.open(str(final)).read_rows("00000") if row["status"] == "ok"]
    export(final, out, drop=UidSet.of(first))
    assert not (out / "00000.tar").exists() and (out / "00001.tar").exists() and is_clean(out, first)
    everything = [row["uid"] for row in rows_of(final) if row["uid"]]
    export(final, out, drop=UidSet.of(everything))
    assert not list(out.glob("*.tar")) and is_clean(out, everything) and not kept(out)


def test_the_originals_of_links_stay(final: Path, tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    uids, before, out = some(source), contents(source), tmp_path / "out"
    export(source, out, link=True)
    export(source, out, link=True, drop=UidSet.of(uids))
    assert is_clean(out, uids) and contents(source) == before


def test_an_export_follows_its_source(final: Path, tmp_path: Path) -> None:
    """Rows that the source withdrew are withdrawn with its shards, and sizes of shards stay as they were cut."""
    uids = [row["uid"] for row in rows_of(final) if row["status"] == "ok"][:4]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export(final, whole)
    export(whole, cut, "parquet", shard_size=3)
    before = marks(cut)
    export(final, whole, drop=UidSet.of(uids))
    export(whole, cut, "parquet", shard_size=3)
    assert is_clean(cut, uids)
    changed = touched(before, marks(cut))
    assert changed < {path.stem for path in cut.glob("*.parquet")} and "00000" in changed


@pytest.mark.parametrize(
    ("format", "size", "stride"),
    [
        ("webdataset", None, 7),
        pytest.param("webdataset", None, 1, marks=pytest.mark.slow),
        pytest.param("parquet", 5, 5, marks=pytest.mark.slow),
        pytest.param("folder", None, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_step_it_ends_in_the_same_bytes(
    final: Path, tmp_path: Path, format: str, size: int | None, stride: int
) -> None:
    uids = [row["uid"] for row in Artifact.open(str(final)).read_rows("00001") if row["uid"]] + some(final)[:1]
    drop, before, killed = listed(tmp_path / "uids.txt", uids), tmp_path / "before", tmp_path / "killed"
    words = CardWords("t", "other")
    for out in (before, tmp_path / "alone"):
        export(final, out, format, shard_size=size, words=words)
    export(final, tmp_path / "alone", format, shard_size=size, words=words, drop=UidSet.of(uids))
    sized = () if size is None else ("--shard-size", size)
    command = ["export", final, "--format", format, *sized, "--workers", 0, "--title", "t", "--drop", drop]
    made = killed_at_steps(before, killed, *command, "--out", killed, stride=stride)
    assert len(made) * stride >= 14
    for folder in made:
        assert contents(folder) == contents(tmp_path / "alone") and is_clean(folder, uids)


def test_captions_packed_by_annotate(tmp_path: Path) -> None:
    """Lists of captions are withdrawn, too, and keys that are no file names are found."""
    source = captioned(tmp_path / "captions")
    uids = [rows_of(source)[index]["uid"] for index in (1, 2)]
    for format in FORMATS:
        out = tmp_path / format
        export(source, out, format)
        assert len(prove_absent(str(out), UidSet.of(uids)).faults) >= 4
        export(source, out, format, drop=UidSet.of(uids))
        assert is_clean(out, uids)


@pytest.mark.slow
def test_a_hundredth_of_a_thousand_shards(tmp_path: Path) -> None:
    source, out = final_shards(tmp_path / "final", shards=1000, rows=1), tmp_path / "out"
    rows = rows_of(source)
    export(source, out)
    before = marks(out)
    gone = {f"{number:05d}": rows[number]["uid"] for number in range(17, 1000, 100)}
    export(source, out, drop=UidSet.of(gone.values()))
    same = {number for number, row in enumerate(rows) if row["uid"] in gone.values()}  # scenes may repeat
    assert touched(before, marks(out)) == {f"{number:05d}" for number in same} >= gone.keys()
    assert is_clean(out, gone.values())


def test_a_bucket_has_nothing_left(final: Path, s3: str, tmp_path: Path) -> None:
    """Loose images, a tar of a shard without pairs, and what a commit had put aside are removed there, too."""
    first = [row["uid"] for row in Artifact.open(str(final)).read_rows("00000") if row["status"] == "ok"]
    uids = [*first, *some(final)]
    for format in ("webdataset", "folder"):
        out = f"{s3}/{format}"
        export(final, out, format)
        assert prove_absent(out, UidSet.of(uids)).faults
        export(final, out, format, drop=UidSet.of(uids))
        assert is_clean(out, uids) and verify(out).notes == []
