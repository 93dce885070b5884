"""Withdrawal from scores, final shards and indexes; the selection of other rows stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import SCORE
from capipe.manifests.shards import RowReader, expand
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.commands.run_job import Exit
from capipe.pipeline.inspect.verify import verify_absent
from capipe.pipeline.jobs.select import preview_select
from capipe.pipeline.jobs.withdraw import withdraw
from capipe.stages.filter.score import passed_on
from capipe.stages.filter.select import SelectConfig

from ...stages.exporting import export
from ...stages.ingesting import rows
from ...stages.scored import foreign_shards, write_scores
from ..conftest import capipe
from ..withdrawing import UNKNOWN, contents, is_clean, killed_at_steps, listed, marks, touched

SIZES = [10, 4, 12, 6]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_shards(tmp_path / "theirs", SIZES)


def uids_of(shards: Path) -> list[str]:
    return [row.uid or "" for shard in expand(str(shards)) for row in RowReader(shard)]


def select(scores: Artifact, shards: Path, out: Path, drop: UidSet | None, **config: object) -> Exit:
    options = SelectConfig.model_validate({"shard_size": 8, **config})
    return select_step(scores, str(shards), str(out), options, workers=0, drop=drop)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("rule", [{"top": 0.5}, {"keep": "clip_score > 0.4"}])
def test_kept_rows_of_the_list_go_and_no_other_comes(
    foreign: Path, tmp_path: Path, rule: dict[str, object], index: bool
) -> None:
    """The threshold of ``top`` and the bounds of the shards are those of before; shards without them stay."""
    scores, out = write_scores(foreign, tmp_path / "scores"), tmp_path / "out"
    config = {**rule, "index": index}
    assert select(scores, foreign, out, None, **config) is Exit.OK
    old, before = rows(out), marks(out)
    last = max(Artifact.open(str(out)).committed())
    gone = [next(row["uid"] for row in old if row["status"] == "ok"), uids_of(foreign)[3], UNKNOWN]
    assert all(uid in "".join(prove_absent(str(out), UidSet.of([uid])).faults) for uid in gone[:2])
    assert select(scores, foreign, out, UidSet.of(gone, "list"), **config) is Exit.OK
    new = rows(out)
    assert touched(before, marks(out)) == {"00000"} != {last}
    assert [row for row in new if row["uid"] not in gone] == [row for row in old if row["uid"] not in gone]
    assert {row["status"] for row in new if row["uid"] in gone} == {"withdrawn"}
    assert is_clean(out, gone) and list(out.glob("*.tar")) == [] if index else is_clean(out, gone)
    report, notes = verify_absent(str(out), UidSet.of(gone))
    assert report.rows == 2 and len(notes) == index and report.faults == []
    with pytest.raises(BadInput, match="made with --drop, of 3 uids"):
        select(scores, foreign, out, None, **config)


def test_an_index_that_withdrew_is_exported_like_shards_that_did(foreign: Path, tmp_path: Path) -> None:
    scores, gone = write_scores(foreign, tmp_path / "scores"), UidSet.of(uids_of(foreign)[::5], "list")
    for name, index in (("copied", False), ("index", True)):
        select(scores, foreign, tmp_path / name, gone, index=index, keep="clip_score > 0.3")
        export(tmp_path / name, tmp_path / f"{name}-out", "parquet")
        assert not prove_absent(str(tmp_path / f"{name}-out"), gone).faults
    files = [contents(tmp_path / f"{name}-out") for name in ("copied", "index")]
    assert all(files[0][name] == files[1][name] for name in files[0] if name.endswith(".parquet"))


def test_a_preview_counts_them_out(foreign: Path, tmp_path: Path) -> None:
    scores, gone = write_scores(foreign, tmp_path / "scores"), UidSet.of(uids_of(foreign)[:5], "list")
    plan, _ = preview_select(scores, str(foreign), SelectConfig(top=1.0), drop=gone)
    assert plan.candidates == sum(SIZES) - 5 == sum(plan.kept)


def test_a_selection_follows_scores_that_withdrew(foreign: Path, tmp_path: Path) -> None:
    """Without a list of its own, by rows that are withdrawn in its input."""
    scores, out = write_scores(foreign, tmp_path / "scores"), tmp_path / "out"
    select(scores, foreign, out, None, top=0.5)
    old, before = rows(out), marks(out)
    gone = next(row["uid"] for row in old if row["status"] == "ok")
    artifact = Artifact.create(scores.url, "score", {"seed": 0}, {"shards": str(foreign)})
    withdrawal = withdraw(artifact, UidSet.of([gone], "list"), SCORE, passed_on)
    artifact.close()
    assert withdrawal is not None and withdrawal.line() == "withdrawn: 1 rows, by 1 of the 1 uids in list"
    select(Artifact.open(scores.url), foreign, out, None, top=0.5)
    assert is_clean(out, [gone]) and touched(before, marks(out)) == {"00000"}
    assert [row for row in rows(out) if row["uid"] != gone] == [row for row in old if row["uid"] != gone]


@pytest.mark.parametrize(
    ("more", "stride"), [(["--index"], 5), *(pytest.param(m, 1, marks=pytest.mark.slow) for m in ([], ["--index"]))]
)
def test_killed_at_any_step(foreign: Path, tmp_path: Path, more: list[str], stride: int) -> None:
    write_scores(foreign, tmp_path / "scores")
    uids = uids_of(foreign)
    gone = [uids[3], uids[-1], *uids[:4]]
    drop, before, killed = listed(tmp_path / "uids.txt", gone), tmp_path / "before", tmp_path / "killed"
    command = ["filter", "--shards", foreign, "--scores", tmp_path / "scores", "--top", 0.6, "--shard-size", 8]
    command += ["--workers", 0, *more, "--out"]
    capipe(*command, before)
    shutil.copytree(before, tmp_path / "alone")
    capipe(*command, tmp_path / "alone", "--drop", drop)
    made = killed_at_steps(before, killed, *command, killed, "--drop", drop, stride=stride)
    assert len(made) * stride >= 10
    for folder in made:
        assert contents(folder / "shards") == contents(tmp_path / "alone/shards") and is_clean(folder / "shards", gone)


@pytest.mark.slow
def test_the_whole_command(foreign: Path, tmp_path: Path) -> None:
    """Scores by a model and the selection, made before and after; the scores of other rows are not made again."""
    out, uids = tmp_path / "out", uids_of(foreign)
    drop = listed(tmp_path / "uids.txt", [uids[0], uids[-1]])
    command = ["filter", "--shards", foreign, "--clip", "tiny/clip", "--keep", "clip_score > -1", "--workers", 0]
    capipe(*command, "--out", out)
    before = marks(out / "scores")
    capipe(*command, "--out", out, "--drop", drop)
    assert touched(before, marks(out / "scores")) == {"00000", "00003"}
    assert is_clean(out / "scores", uids[:1]) and is_clean(out / "shards", [uids[0], uids[-1]])
    capipe(*command, "--out", tmp_path / "anew", "--drop", drop)
    assert contents(out / "scores") == contents(tmp_path / "anew/scores")
    assert rows(out / "shards") == rows(tmp_path / "anew/shards")
    assert "absent; 2 uids" in capipe("verify", out, "--absent", drop).stdout


def test_scores_in_a_bucket(foreign: Path, tmp_path: Path, s3: str) -> None:
    scores = write_scores(foreign, f"{s3}/scores")
    gone = [uids_of(foreign)[0], uids_of(foreign)[-1]]
    before = {name: record.files for name, record in scores.committed().items()}
    artifact = Artifact.create(scores.url, "score", {"seed": 0}, {"shards": str(foreign)})
    withdrawal = withdraw(artifact, UidSet.of(gone, "list"), SCORE, passed_on)
    artifact.close()
    after = {name: record.files for name, record in Artifact.open(scores.url).committed().items()}
    assert withdrawal is not None and {name for name in after if after[name] != before[name]} == {"00000", "00003"}
    report = prove_absent(scores.url, UidSet.of(gone))
    assert report.faults == [] and report.rows == 2
