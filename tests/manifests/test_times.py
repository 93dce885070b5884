"""Times are in one file of an artifact, which nothing hangs on; folders from before it still tell theirs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests import times
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.manifests.object_store import log
from capipe.manifests.schema import INGEST
from capipe.manifests.verify import verify
from capipe.pipeline.inspect.status import state


def write(out: Path | str, *shards: str) -> Artifact:
    artifact = Artifact.create(str(out), "ingest", {"a": 1}, {"shards_total": 2, "b": 1})
    for shard in shards:
        with artifact.begin(shard, INGEST, tar=True) as made:
            made.write({"key": "k" + shard, "uid": None, "status": "corrupt", "error": "x"})
            made.commit(rows_in=1, input_info={"digest": "d"}, started=time.time() - 60)
    artifact.note(items=2)
    artifact.close()
    return artifact


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_made_an_hour_later_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", "00000", "00001")
    clock, moment = time.time, time.gmtime
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    monkeypatch.setattr(time, "gmtime", lambda *given: moment(*(given or (clock() + 3600,))))
    write(tmp_path / "two", "00000")
    write(tmp_path / "two", "00001")  # resumed
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} == {"_capipe/times.jsonl"} and one.keys() == two.keys()
    first, second = (Artifact.open(str(tmp_path / name)) for name in ("one", "two"))
    assert first.manifest_digest() == second.manifest_digest()
    assert first.created < second.created
    assert 119 < state(first.url).seconds < 125


def test_without_its_times_an_artifact_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "out", "00000")
    path = tmp_path / "out/_capipe/times.jsonl"
    path.write_bytes(b"[]\nnot json\n" + path.read_bytes() + b'{"shard": "00000", "sec')  # torn, edited
    assert times.read(Folder(str(tmp_path / "out"))).seconds["00000"] > 59
    write(tmp_path / "out", "00001")
    assert set(times.read(Folder(str(tmp_path / "out"))).seconds) == {"00000", "00001"}
    path.unlink()
    artifact = Artifact.open(str(tmp_path / "out"))
    assert artifact.created == "" and state(artifact.url).seconds == 0 and verify(artifact.url).faults == []


def test_a_bucket_has_them_too(s3: str) -> None:
    write(f"{s3}/out", "00000", "00001")
    artifact = Artifact.open(f"{s3}/out")
    assert artifact.created.endswith("Z") and times.read(artifact.folder).created == artifact.created
    assert set(artifact.seconds()) == {"00000", "00001"}


def test_folders_from_before_times_had_a_file_tell_theirs(tmp_path: Path) -> None:
    write(tmp_path / "out", "00000", "00001")
    (tmp_path / "out/_capipe/times.jsonl").unlink()
    config = tmp_path / "out/_capipe/config.json"
    older: dict[str, Any] = {**json.loads(config.read_bytes()), "created": "2025-01-02T03:04:05Z"}
    del older["digest"]
    config.write_text(json.dumps(older))
    manifest = tmp_path / "out/_capipe/manifest.jsonl"
    lines = [{**json.loads(line), "seconds": 2.5} for line in manifest.read_text().splitlines()]
    manifest.write_text(
        "".join(json.dumps({k: v for k, v in each.items() if k != "checksum"}) + "\n" for each in lines)
    )
    artifact = write(tmp_path / "out")  # resumed
    assert artifact.created == Artifact.open(artifact.url).created == "2025-01-02T03:04:05Z"
    assert state(artifact.url).seconds == 5.0 and verify(artifact.url).faults == []


def test_who_worked_on_a_shard_is_kept_with_its_time(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "this_worker", lambda: times.Worker("w", 2, 8))
    for out in (str(tmp_path / "out"), f"{s3}/worked"):
        write(out, "00000", "00001")
        artifact = Artifact.open(out)
        assert len(artifact.committed()) == 2
        spans = times.read(artifact.folder, artifact.manifest.notes).spans
        assert [span.by for span in spans] == [times.Worker("w", 2, 8)] * 2
        on_gpus, on_cores = times.device_seconds(spans)
        assert 119 < on_gpus < 130 and on_cores == 0  # both shards were open at once


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("worker", value) for value in (None, "", 7, ["w"])),
        *(("gpus", value) for value in (None, -1, 1.5, "1", True, 1e400, 2**70)),
        *(("started", value) for value in (None, -1, "0", 1e400)),
    ],
)
def test_work_that_cannot_be_is_not_counted(tmp_path: Path, name: str, value: Any) -> None:
    artifact = write(tmp_path / "out", "00000")
    path = tmp_path / "out/_capipe/times.jsonl"
    created, line = path.read_text().splitlines()
    path.write_text(f"{created}\n{json.dumps({**json.loads(line), name: value})}\n")
    found = times.read(artifact.folder)
    assert found.spans == () and found.seconds["00000"] > 59


def test_notes_of_a_store_from_before_workers_are_read() -> None:
    folder, attempt = Folder("memory://notes"), "0" * 32
    older = {"attempt": attempt, "generation": "", "objects": {}, "started": 1.0, "ended": 2.0, "seconds": 1.0}
    entry = log.parse(folder, "00000.json", b"{}\n" + json.dumps(older).encode())
    assert (entry.note.worker, entry.note.gpus, entry.note.cores) == ("", 0, 0)
    for wrong in ({"worker": ["w"]}, {"gpus": "1"}, {"cores": None}):
        with pytest.raises(ArtifactMismatch, match="not an entry of a manifest"):
            log.parse(folder, "00000.json", b"{}\n" + json.dumps({**older, **wrong}).encode())
