"""An ingest that was stopped, refused, broken or out of room, and goes on."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch, RunFailed
from capipe.manifests.artifact import Artifact
from capipe.manifests.verify import verify
from capipe.pipeline.jobs.ingest import execute_ingest, plan_ingest
from capipe.pipeline.runners.messages import ShardDone, ShardFailed
from capipe.stages.ingest.shard import IngestConfig, pending, plan
from capipe.stages.ingest.sources import open_sources

from ...conftest import photo
from ..ingesting import ingest, rows


def test_resume_skips_what_is_committed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = plan_ingest([str(photos)], str(out), IngestConfig(shard_size=5), workers=1)
    stop, events = threading.Event(), []

    def report(event: Any) -> None:
        if isinstance(event, ShardDone):
            events.append(event)
        if len(events) == 2:
            stop.set()

    outcome = execute_ingest(made, report, stop)
    made.artifact.close()
    assert outcome.interrupted and 2 <= len(events) < 5
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    again = ingest(photos, out=out, shard_size=5)
    assert len(before) + len(again) == 5
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert [row["source"] for row in rows(out)] == [str(path) for path in sorted(photos.glob("*.jpg"))]
    assert ingest(photos, out=out, shard_size=5) == []
    assert verify(str(out)).faults == []


def test_resume_from_another_place(photos: Path, tmp_path: Path) -> None:
    ingest(photos, out=tmp_path / "out", shard_size=5)
    moved = photos.rename(tmp_path / "elsewhere")
    assert ingest(moved, out=tmp_path / "out", shard_size=5) == []


def test_resume_refuses_a_changed_source(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest(photos, out=out, shard_size=5)
    (photos / "11.jpg").write_bytes(photo(99, (100, 100)))
    with pytest.raises(ArtifactMismatch, match=r"has other items now than when shard 00002 was ingested.*--fresh"):
        ingest(photos, out=out, shard_size=5)
    (photos / "11.jpg").write_bytes(photo(11))
    assert ingest(photos, out=out, shard_size=5) == []
    for number in range(15, 25):
        (photos / f"{number}.jpg").unlink()
        (photos / f"{number}.txt").unlink()
    with pytest.raises(ArtifactMismatch, match="has fewer items now than when shard 00003"):
        ingest(photos, out=out, shard_size=5)
    assert len(ingest(photos, out=out, shard_size=5, fresh=True)) == 3
    assert len(rows(out)) == 15


def test_resume_refuses_another_configuration(photos: Path, tmp_path: Path) -> None:
    ingest(photos, out=tmp_path / "out", shard_size=5)
    with pytest.raises(ArtifactMismatch, match="shard_size: 5 -> 6"):
        ingest(photos, out=tmp_path / "out", shard_size=6)


def test_a_source_that_grows_while_it_is_planned_is_cut_in_order(photos: Path) -> None:
    drawn = 0

    def counted() -> Iterator[Any]:
        nonlocal drawn
        for ref in open_sources([str(photos)]):
            drawn += 1
            yield ref

    tasks = plan(counted(), IngestConfig(shard_size=10))
    assert next(tasks).shard == "00000" and drawn == 10  # lazy: nothing beyond the first shard was looked at
    assert [len(task.refs) for task in tasks] == [10, 5]


def test_pending_needs_every_committed_shard(photos: Path, tmp_path: Path) -> None:
    ingest(photos, out=tmp_path / "out", shard_size=5)
    artifact = Artifact.open(str(tmp_path / "out"))
    tasks = list(plan(open_sources([str(photos)]), IngestConfig(shard_size=5)))
    assert list(pending(tasks, artifact)) == []
    with pytest.raises(ArtifactMismatch):
        list(pending(tasks[:2], artifact))


def test_a_shard_that_keeps_failing_is_quarantined_and_tried_again_later(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capipe.pipeline.jobs import ingest as job

    real = job.ingest_shard

    def failing(task: Any, config: IngestConfig, artifact: Artifact) -> Any:
        if task.shard == "00001":
            raise ValueError("cosmic rays")
        return real(task, config, artifact)

    out = tmp_path / "out"
    monkeypatch.setattr(job, "ingest_shard", failing)
    events = ingest(photos, out=out, shard_size=10)
    assert [type(event) for event in events] == [ShardDone, ShardFailed, ShardDone]
    assert Artifact.open(str(out)).quarantined() == {"00001": "ValueError: cosmic rays"}
    monkeypatch.setattr(job, "ingest_shard", real)
    assert [event.record.shard for event in ingest(photos, out=out, shard_size=10)] == ["00001"]
    assert Artifact.open(str(out)).quarantined() == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(("workers", "shard_size"), [(0, 2), (2, 2), (0, 25)])
def test_a_full_disk_ends_the_run_and_harms_nothing(
    photos: Path, small_disk: Path, workers: int, shard_size: int
) -> None:
    """Small shards fill the disk with committed work, a large one fills it from within its own tar."""
    out, shards = small_disk / "out", -(-25 // shard_size)
    with pytest.raises(RunFailed, match="no space left"):
        ingest(photos, out=out, shard_size=shard_size, workers=workers)
    done = len(Artifact.open(str(out)).committed())
    assert done < shards
    if workers == 0:  # two workers may fill it before either has committed anything
        assert (done > 0) == (shards > 1)
    assert not (out / "_capipe/tmp").exists()
    assert verify(str(out)).faults == []
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert len(ingest(photos, out=out, shard_size=shard_size)) == shards - done
    assert verify(str(out)).faults == []
