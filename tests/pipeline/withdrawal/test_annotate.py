"""Withdrawal from captions, beside images or packed with them: no model is asked, other rows keep what they have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import USAGE
from capipe.manifests.shards import uid_of
from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet

from ...conftest import photo
from ..conftest import CaptionServer, capipe, one_line, table
from ..withdrawing import UNKNOWN, contents, is_clean, killed_at_steps, listed, marks, touched


@pytest.fixture
def shards(foreign_tars: Path) -> Path:
    return foreign_tars


GONE = [uid_of(photo(11)), uid_of(photo(13)), UNKNOWN]


def options(shards: object, out: Path, server: CaptionServer, *more: object) -> list[object]:
    given = ["annotate", "--shards", shards, "--model", "m", "--engine", server.url, "--concurrency", 4, "--out", out]
    return [*given, *more]


@pytest.mark.parametrize("pack", [[], ["--pack"]])
def test_rows_are_withdrawn_without_a_model(
    shards: Path, tmp_path: Path, server: CaptionServer, pack: list[str]
) -> None:
    out, drop = tmp_path / "out", listed(tmp_path / "uids.txt", GONE)
    command = options(shards, out, server, *pack)
    capipe(*command)
    before, marked, asked = table(out), marks(out), server.requests
    assert prove_absent(str(out), UidSet.of(GONE)).faults
    done = capipe(*command, "--drop", drop)
    assert f"withdrawn: 2 rows, by 2 of the 3 uids in {drop}; 1 are of no image here" in done.stderr
    assert server.requests == asked and touched(marked, marks(out)) == {"00001"}
    after = table(out)
    for old, new in zip(before, after, strict=True):
        gone = {"status": "withdrawn", "error": new["error"], "text": None, "captions": []}
        gone |= {field.name: None for field in USAGE}
        assert new == ({**old, **gone} if old["uid"] in GONE else old)
    assert "(--drop)" in after[7]["error"] and is_clean(out, GONE)
    capipe(*options(shards, tmp_path / "anew", server, *pack), "--drop", drop)
    assert server.requests == 2 * asked - 2  # images that are listed at first are never shown to it
    assert contents(out) == contents(tmp_path / "anew")
    capipe(*command, "--fresh")
    assert table(out) == before


def test_a_list_that_would_shrink_is_refused(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    out = tmp_path / "out"
    one, two = listed(tmp_path / "one.txt", GONE[:1]), listed(tmp_path / "two.txt", GONE[1:])
    capipe(*options(shards, out, server), "--drop", one)
    before = contents(out)
    assert f"{two}: lacks 1 of the 1 uids" in one_line(capipe(*options(shards, out, server), "--drop", two, code=2))
    assert "made with --drop, of 1 uids" in one_line(capipe(*options(shards, out, server), code=2))
    assert contents(out) == before
    share = options(shards, out, server, "--share", "--drop", listed(tmp_path / "both.txt", GONE))
    assert "run the command once without --share" in one_line(capipe(*share, code=2))
    assert contents(out) == before and is_clean(out, GONE[:1])
    capipe(*options(shards, out, server), "--share", "--drop", one)


def test_a_finished_row_of_an_unfinished_shard_is_withdrawn(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    """What an earlier run left in the journal is not taken for an image that was withdrawn since."""
    out = tmp_path / "out"
    capipe(*options(shards, out, server))
    artifact = Artifact.open(str(out))
    rows = dict(enumerate(artifact.read_rows("00001")))
    artifact.reopen(artifact.committed()["00001"], rows)
    faults = prove_absent(str(out), UidSet.of(GONE[:1])).faults
    assert f"{out}/_capipe/journal/00001.jsonl: line 3 is of a listed image, or of its row" in faults
    asked = server.requests
    capipe(*options(shards, out, server), "--drop", listed(tmp_path / "uids.txt", GONE))
    assert server.requests == asked and is_clean(out, GONE)


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step(shards: Path, tmp_path: Path, server: CaptionServer, stride: int) -> None:
    gone = [*GONE, uid_of(photo(2))]
    drop, before, killed = listed(tmp_path / "uids.txt", gone), tmp_path / "before", tmp_path / "killed"
    capipe(*options(shards, before, server, "--pack"))
    shutil.copytree(before, tmp_path / "alone")
    capipe(*options(shards, tmp_path / "alone", server, "--pack", "--drop", drop))
    made = killed_at_steps(before, killed, *options(shards, killed, server, "--pack", "--drop", drop), stride=stride)
    assert len(made) * stride >= 12
    for folder in made:
        assert contents(folder) == contents(tmp_path / "alone") and is_clean(folder, gone)


def test_a_shard_that_cannot_be_rewritten_is_named(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    """Its rows are not withdrawn, which is no success; the same command does it once the file is restored."""
    out, drop = tmp_path / "out", listed(tmp_path / "uids.txt", GONE)
    capipe(*options(shards, out, server, "--pack"))
    command = options(shards, out, server, "--pack", "--drop", drop)
    sound = (out / "00001.tar").read_bytes()
    (out / "00001.tar").write_bytes(sound[:-512] + b"x" * 512)
    done = capipe(*command, code=1)
    assert "shard 00001 quarantined" in done.stdout and "00001.tar: its bytes are not those" in done.stdout
    assert f"{drop}: not all of it is withdrawn" in done.stderr and "are of no image here" not in done.stderr
    (out / "00001.tar").unlink()
    text = "00001.tar: cannot be read (No such file or directory), and its shard has withdrawn images; restore it"
    assert text in capipe(*command, code=1).stdout
    assert any("is not finished" in fault for fault in prove_absent(str(out), UidSet.of(GONE)).faults)
    (out / "00001.tar").write_bytes(sound)
    capipe(*command)
    assert is_clean(out, GONE)
