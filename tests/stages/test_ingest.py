"""From items to committed shards: one row each, bytes untouched, every reason kept."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError

from capipe.errors import ArtifactMismatch, BadInput, RunFailed
from capipe.manifests.artifact import Artifact
from capipe.manifests.verify import verify
from capipe.models.images import ImageLimits
from capipe.pipeline.events import Pulse, ShardDone, ShardFailed
from capipe.pipeline.ingesting import execute_ingest, plan_ingest
from capipe.stages.ingest import IngestConfig, ingest_item, pending, plan
from capipe.stages.items import Handles, Item
from capipe.stages.sources import open_sources

from ..conftest import photo

Row = dict[str, Any]


def ingest(*sources: object, out: Path | str, workers: int = 0, fresh: bool = False, **config: Any) -> list[Any]:
    """Run an ingest to its end; returns what became of its shards."""
    events: list[Any] = []
    made = plan_ingest([str(s) for s in sources], str(out), IngestConfig(**config), workers=workers, fresh=fresh)
    try:
        execute_ingest(made, events.append, threading.Event())
    finally:
        made.artifact.close()
    pulses, shards = ([e for e in events if isinstance(e, Pulse) == wanted] for wanted in (True, False))
    assert [pulse.rows for pulse in pulses] == [e.record.rows for e in shards if isinstance(e, ShardDone)]
    return shards


def rows(out: Path) -> list[Row]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                file = tar.extractfile(name)
                assert file is not None
                found[name] = file.read()
    return found


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(25):
        (root / f"{number:02d}.jpg").write_bytes(photo(number))
        (root / f"{number:02d}.txt").write_text(f"picture {number}")
    return root


def test_shards_keys_and_bytes(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    events = ingest(photos, out=out, shard_size=10)
    assert [(e.record.shard, e.record.count) for e in events] == [("00000", 10), ("00001", 10), ("00002", 5)]
    found = rows(out)
    assert [row["key"] for row in found] == [f"{n // 10:05d}{n % 10}" for n in range(25)]
    assert all(row["status"] == "ok" and row["error"] is None for row in found)
    data = members(out)
    assert len(data) == 75
    for number, row in enumerate(found):
        image = photo(number)
        assert data[f"{row['key']}.jpg"] == image
        assert data[f"{row['key']}.txt"] == f"picture {number}".encode() and row["text"] == f"picture {number}"
        assert row["sha256"] == hashlib.sha256(image).hexdigest() and row["uid"] == row["sha256"][:32]
        assert (row["width"], row["height"], row["format"]) == (96, 64, "jpg") and len(row["phash"]) == 16
        assert row["source"] == str(photos / f"{number:02d}.jpg")
        meta = json.loads(data[f"{row['key']}.json"])
        assert meta == {"uid": row["uid"], "width": 96, "height": 64, "source": row["source"]}
    assert json.loads((out / "00002_stats.json").read_text())["successes"] == 5
    assert verify(str(out)).faults == []
    assert Artifact.open(str(out)).config["run"]["shards_total"] == 3


def test_keys_are_img2datasets_at_the_default_shard_size(photos: Path, tmp_path: Path) -> None:
    ingest(photos, out=tmp_path / "out")
    assert rows(tmp_path / "out")[12]["key"] == "000000012"


def test_workers_change_nothing(photos: Path, tmp_path: Path) -> None:
    ingest(photos, out=tmp_path / "one", shard_size=4)
    ingest(photos, out=tmp_path / "two", shard_size=4, workers=2)
    for path in sorted((tmp_path / "one").glob("*.tar")) + sorted((tmp_path / "one").glob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert len(list((tmp_path / "two").glob("*.tar"))) == 7


BAD_FILES: dict[str, tuple[bytes, str, str]] = {
    "truncated.jpg": (photo(1)[:-20], "corrupt", "truncated"),
    "page.jpg": (b"<!DOCTYPE html><html>404 not found</html>", "unsupported", "an HTML page"),
    "zero.jpg": (b"", "corrupt", "zero bytes"),
    "strip.png": (encode(Image.new("RGB", (1, 5000)), "PNG"), "too_small", "1x5000"),
    "wall.png": (encode(Image.new("RGB", (1100, 1000)), "PNG"), "too_large", "1 megapixels"),
    "moving.gif": (encode(Image.new("RGB", (64, 64)), "GIF"), "unsupported", "a GIF image"),
    "notes.txt": (b"not a picture", "unsupported", "plain text"),
    "moving.webp": (
        encode(Image.new("RGB", (64, 64)), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")]),
        "unsupported",
        "animated image (2 frames)",
    ),
}
GOOD_FILES = {
    "cmyk.jpg": encode(Image.new("CMYK", (64, 48), (10, 20, 30, 0)), "JPEG"),
    "deep.png": encode(Image.fromarray(np.full((48, 64), 40_000, np.uint16)), "PNG"),
    "palette.png": encode(Image.new("RGB", (64, 48), "red").quantize(4), "PNG"),
    "really_a_png.jpg": photo(4, fmt="PNG"),
    "turned.jpg": encode(
        Image.new("RGB", (48, 64), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    ),
}


def test_bad_input_is_rows_with_reasons(tmp_path: Path) -> None:
    root = tmp_path / "mess"
    root.mkdir()
    for name, data in GOOD_FILES.items():
        (root / name).write_bytes(data)
    for name, (data, _, _) in BAD_FILES.items():
        (root / name).write_bytes(data)
    (root / "nowhere.jpg").symlink_to("missing")
    out = tmp_path / "out"
    (event,) = ingest(root, out=out, max_image_pixels=10**6)
    found = {Path(row["source"]).name: row for row in rows(out)}
    assert set(found) == {*BAD_FILES, *GOOD_FILES, "nowhere.jpg"}
    for name, (data, status, reason) in BAD_FILES.items():
        assert found[name]["status"] == status and reason in found[name]["error"], found[name]
        assert found[name]["sha256"] == (hashlib.sha256(data).hexdigest() if data else None)
        assert found[name]["width"] is None
    assert "cannot be read" in found["nowhere.jpg"]["error"]
    assert {name: found[name]["status"] for name in GOOD_FILES} == dict.fromkeys(GOOD_FILES, "ok")
    assert found["really_a_png.jpg"]["format"] == "png"
    assert (found["turned.jpg"]["width"], found["turned.jpg"]["height"]) == (64, 48)
    data = members(out)
    assert sorted(name.partition(".")[2] for name in data) == sorted(["jpg"] * 2 + ["png"] * 3 + ["txt", "json"] * 5)
    assert event.record.rows == {"corrupt": 3, "ok": 5, "too_large": 1, "too_small": 1, "unsupported": 4}


def test_faults_of_sidecars_cost_no_image(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    sidecars = {
        "1": (b"caf\xe9", b'{"fine": 1}'),
        "2": (b"ok", b"[1, 2]"),
        "3": (b"ok", b"{broken"),
        "4": (b"ok", b'{"half": "\\ud800", "caption": "\\ud800", "nan": NaN}'),
        "5": (b"ok", b"[" * 100_000),
        "6": (b"ok", b'{"a":' * 600 + b"1" + b"}" * 600),
    }
    for name, (text, meta) in sidecars.items():
        (root / f"{name}.jpg").write_bytes(photo(int(name)))
        (root / f"{name}.txt").write_bytes(text)
        (root / f"{name}.json").write_bytes(meta)
    out = tmp_path / "out"
    ingest(root, out=out)
    found = rows(out)
    assert [row["status"] for row in found] == ["ok"] * 6
    assert found[0]["text"] == "caf�" and "txt is not UTF-8" in found[0]["error"]
    assert "not an object" in found[1]["error"] and "unreadable" in found[2]["error"]
    assert found[3]["error"] is None and "unreadable" in found[4]["error"]
    data = members(out)
    for row in found:
        meta = json.loads(data[f"{row['key']}.json"].decode(), parse_constant=lambda c: pytest.fail(c))
        assert meta["uid"] == row["uid"]
    assert data[f"{found[0]['key']}.txt"] == "caf�".encode()
    assert json.loads(data[f"{found[3]['key']}.json"])["nan"] is None


def test_metadata_is_kept_beside_ours(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    meta = {"uid": "theirs", "width": 7, "height": 64, "url": "http://x", "tags": ["a", "ü"]}
    tar = make_tar({"a.jpg": photo(1), "a.json": json.dumps(meta).encode(), "a.txt": b"said"})
    ingest(tar, out=tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert (row["url"], row["text"], row["source"]) == ("http://x", "said", f"{tar}/a.jpg")
    found = json.loads(members(tmp_path / "out")[f"{row['key']}.json"])
    ours = {"uid": row["uid"], "width": 96, "height": 64, "source": row["source"]}
    theirs = {"original_uid": "theirs", "original_width": 7, "url": "http://x", "tags": ["a", "ü"]}
    assert found == ours | theirs


def test_repeated_images_are_separate_rows_of_one_uid(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for name in ("a", "b", "c"):
        (root / f"{name}.jpg").write_bytes(photo(1))
    ingest(root, out=tmp_path / "out")
    found = rows(tmp_path / "out")
    assert len({row["key"] for row in found}) == 3 and len({row["uid"] for row in found}) == 1
    assert [row["status"] for row in found] == ["ok"] * 3
    assert len(members(tmp_path / "out")) == 9


class _Explosive:
    """An item whose reading raises whatever it is given."""

    source = "somewhere"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def identity(self) -> str:
        return "x"

    def load(self, handles: Handles) -> Item:
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (MemoryError("9 GB"), "unexpected MemoryError: 9 GB"),
        (KeyError("image"), "unexpected KeyError: 'image'"),
    ],
)
def test_whatever_an_item_raises_becomes_its_row(error: Exception, reason: str) -> None:
    row, files = ingest_item(_Explosive(error), "k", ImageLimits(), Handles())
    assert (row["status"], row["error"], row["source"], files) == ("corrupt", reason, "somewhere", None)


# --- resuming ---------------------------------------------------------------------------------------------------------


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
    from capipe.pipeline import ingesting

    real = ingesting.ingest_shard

    def failing(task: Any, config: IngestConfig, artifact: Artifact) -> Any:
        if task.shard == "00001":
            raise ValueError("cosmic rays")
        return real(task, config, artifact)

    out = tmp_path / "out"
    monkeypatch.setattr(ingesting, "ingest_shard", failing)
    events = ingest(photos, out=out, shard_size=10)
    assert [type(event) for event in events] == [ShardDone, ShardFailed, ShardDone]
    assert Artifact.open(str(out)).quarantined() == {"00001": "ValueError: cosmic rays"}
    monkeypatch.setattr(ingesting, "ingest_shard", real)
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
    assert done < shards and (done > 0) == (shards > 1)
    assert not (out / "_capipe/tmp").exists()
    assert verify(str(out)).faults == []
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert len(ingest(photos, out=out, shard_size=shard_size)) == shards - done
    assert verify(str(out)).faults == []


# --- edges ------------------------------------------------------------------------------------------------------------


def test_out_inside_the_source_is_refused(photos: Path) -> None:
    with pytest.raises(BadInput, match="lies inside the source"):
        ingest(photos, out=photos / "shards")
    assert not (photos / "shards").exists()


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError):
        IngestConfig(shard_sise=5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        IngestConfig(shard_size=0)
    assert all(field.description for field in IngestConfig.model_fields.values())


def test_memory_to_memory(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe(f"/in-{tmp_path.name}/a.jpg", photo(1))
    ingest(f"memory://in-{tmp_path.name}", out=f"memory://out-{tmp_path.name}", workers=2)
    assert fs.exists(f"/out-{tmp_path.name}/00000.tar")
    assert verify(f"memory://out-{tmp_path.name}").faults == []


def test_img2dataset_folder_in_and_again(photos: Path, tmp_path: Path) -> None:
    """Our own shards are an input like any other tars; images and texts pass through unchanged."""
    ingest(photos, out=tmp_path / "once", shard_size=10)
    ingest(tmp_path / "once", out=tmp_path / "twice", shard_size=25)
    first, second = rows(tmp_path / "once"), rows(tmp_path / "twice")
    for column in ("uid", "sha256", "phash", "text", "width"):
        assert [row[column] for row in first] == [row[column] for row in second]


def test_webdataset_and_datasets_read_the_shards(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (photos / "00.txt").unlink()  # an image without text still has all members
    ingest(photos, out=out, shard_size=10)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [photo(n) for n in range(25)]
    assert [sample["txt"] for sample in samples] == [b"", *(f"picture {n}".encode() for n in range(1, 25))]
    loaded = datasets.load_dataset("webdataset", data_files=urls, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 25 and loaded[3]["txt"] == "picture 3" and loaded[3]["jpg"].size == (96, 64)
    assert [meta["uid"] for meta in loaded["json"]] == [row["uid"] for row in rows(out)]
