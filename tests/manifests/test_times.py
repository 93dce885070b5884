"""Times are in one file of an artifact, which nothing hangs on; folders from before it still tell theirs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests import times
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
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
