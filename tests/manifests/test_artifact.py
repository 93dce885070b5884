"""The transaction, the manifest, the journal, the lock and the fingerprint: what survives what."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capipe.errors import ArtifactMismatch, BadInput, CapipeError, RunFailed
from capipe.manifests.artifact import Artifact
from capipe.manifests.journal import Journal
from capipe.manifests.schema import INGEST
from capipe.manifests.verify import verify

SEMANTIC = {"model": "m", "sampling": {"temperature": 0.0}}


def row(key: str, status: str = "ok") -> dict[str, Any]:
    return {"key": key, "uid": key * 32, "status": status, "error": None}


def make(out: Path, semantic: dict[str, Any] = SEMANTIC, **options: Any) -> Artifact:
    return Artifact.create(str(out), "test", semantic, {"shards_total": 2}, **options)


def commit(artifact: Artifact, shard: str, keys: str = "ab") -> None:
    with artifact.begin(shard, INGEST) as transaction:
        for key in keys:
            transaction.write(row(shard[-1] + key, "ok" if key != "b" else "corrupt"))
        transaction.commit(rows_in=len(keys), input_info={"digest": "x"})


def test_a_committed_shard_has_its_files_and_its_line(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    record = artifact.committed()["00000"]
    assert record.rows == {"corrupt": 1, "ok": 1}
    for name, entry in record.files.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert pq.read_table(tmp_path / "out/00000.parquet").column("key").to_pylist() == ["0a", "0b"]
    stats = json.loads((tmp_path / "out/00000_stats.json").read_bytes())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (2, 1, {"corrupt": 1, "success": 1})


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    with pytest.raises(RuntimeError), artifact.begin("00000", INGEST, tar=True) as transaction:
        transaction.write(row("a"), {"jpg": b"x"})
        raise RuntimeError
    artifact.close()
    assert artifact.committed() == {}
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "config.json",
        "lock",
        "times.jsonl",
    ]


def test_rows_that_do_not_add_up_are_not_committed(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    with pytest.raises(RunFailed, match="3 rows in, 1 rows out"), artifact.begin("00000", INGEST) as transaction:
        transaction.write(row("a"))
        transaction.commit(rows_in=3, input_info={"digest": "x"})
    assert artifact.committed() == {}


def test_keys_are_unique_in_a_shard(tmp_path: Path) -> None:
    with make(tmp_path / "out").begin("00000", INGEST) as transaction:
        transaction.write(row("a"))
        with pytest.raises(ValueError, match="two rows"):
            transaction.write(row("a"))


def test_a_torn_manifest_line_is_no_commit_and_is_mended_by_the_next(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    lines = tmp_path / "out/_capipe/manifest.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole + whole[: len(whole) // 2])
    assert list(artifact.committed()) == ["00000"]
    commit(artifact, "00001")
    assert list(artifact.committed()) == ["00000", "00001"]


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    lines = tmp_path / "out/_capipe/manifest.jsonl"
    lines.write_text(lines.read_text().replace('"ok":', '"fine":'))
    with pytest.raises(ArtifactMismatch, match=r"manifest\.jsonl:1"):
        artifact.committed()


def test_the_same_configuration_resumes_and_another_is_refused_by_name(tmp_path: Path) -> None:
    first = make(tmp_path / "out")
    commit(first, "00000")
    first.close()
    again = make(tmp_path / "out")
    assert list(again.committed()) == ["00000"] and again.fingerprint == first.fingerprint
    again.close()
    with pytest.raises(ArtifactMismatch, match=r"sampling\.temperature: 0\.0 -> 1\.0"):
        make(tmp_path / "out", {"model": "m", "sampling": {"temperature": 1.0}})
    assert list(Artifact.open(str(tmp_path / "out")).committed()) == ["00000"]


def test_fresh_starts_over_and_spares_strangers(tmp_path: Path) -> None:
    first = make(tmp_path / "out")
    commit(first, "00000")
    first.close()
    (tmp_path / "out/notes.md").write_text("mine")
    fresh = make(tmp_path / "out", {"model": "n"}, fresh=True)
    assert fresh.committed() == {}
    assert not (tmp_path / "out/00000.parquet").exists() and (tmp_path / "out/notes.md").exists()


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(BadInput, match="holds other files"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_an_edited_config_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out").close()
    path = tmp_path / "out/_capipe/config.json"
    path.write_text(path.read_text().replace('"m"', '"n"'))
    with pytest.raises(ArtifactMismatch, match="fingerprint"):
        Artifact.open(str(tmp_path / "out"))


def test_one_writer_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal; from capipe.manifests.artifact import Artifact\n"
        f"a = Artifact.create({str(tmp_path / 'out')!r}, 'test', {SEMANTIC!r}, {{}})\n"
        "a.folder.private('tmp').mkdir(exist_ok=True); (a.folder.private('tmp') / '00000.tar').touch()\n"
        "print('locked', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(BadInput, match="another capipe process"):
            make(tmp_path / "out")
        other.kill()
    artifact = make(tmp_path / "out")
    assert not list(artifact.folder.private("tmp").glob("*"))  # what the dead one left is cleared


def test_the_journal_remembers_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, "f")
    for i in range(5):
        journal.append(i, row(str(i)))
    journal.close()
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 30):
        path.write_bytes(whole[:cut])
        torn = Journal(path, "f")
        assert sorted(torn.rows) == [0, 1, 2, 3]
        torn.append(9, row("9"))
        torn.close()
        assert sorted(Journal(path, "f").rows) == [0, 1, 2, 3, 9]
    path.write_bytes(whole.replace(b'"key":"1"', b'"key":"x"'))
    assert sorted(Journal(path, "f").rows) == [0]  # nothing after a damaged line is trusted


def test_the_journal_of_another_configuration_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, "f")
    journal.append(0, row("a"))
    journal.close()
    assert Journal(path, "g").rows == {}


def test_a_journal_that_outlived_its_commit_is_dropped(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    for shard in ("00000", "00001"):
        artifact.journal(shard).close()
    artifact.close()
    artifact = make(tmp_path / "out")
    assert [p.name for p in artifact.folder.private("journal").iterdir()] == ["00001.jsonl"]


def test_reopening_keeps_the_good_rows_at_every_moment(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    artifact.reopen(artifact.committed()["00000"], {0: row("0a")})
    assert artifact.committed() == {}
    assert list(artifact.journal("00000").rows) == [0]
    commit(artifact, "00000")
    assert list(artifact.committed()) == ["00000"]


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact = make(out)
    commit(artifact, "00000")
    artifact.close()
    assert verify(str(out)).faults == []
    parquet = out / "00000.parquet"
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "sha256" in verify(str(out)).faults[0]
    parquet.write_bytes(whole[:-1])
    assert "bytes" in verify(str(out)).faults[0]
    parquet.unlink()
    assert "missing" in verify(str(out)).faults[0]
    parquet.write_bytes(whole)
    (out / "_capipe/tmp").mkdir()
    (out / "_capipe/tmp/00001.tar").touch()
    assert "left behind" in verify(str(out)).faults[0]


@pytest.mark.parametrize("name", ["config.json", "manifest.jsonl"])
def test_any_flipped_byte_is_a_finding_in_words(tmp_path: Path, name: str) -> None:
    artifact = make(tmp_path / "out")
    commit(artifact, "00000")
    artifact.close()
    assert verify(str(tmp_path / "out")).faults == []
    path = tmp_path / "out/_capipe" / name
    data = path.read_bytes()
    for place in range(len(data) - 1):  # without the manifest's last newline, which makes a line a commit
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            found = verify(str(tmp_path / "out")).faults
        except CapipeError as error:
            found = [str(error)]
        assert found and name in found[0], data[max(0, place - 20) : place + 20]
