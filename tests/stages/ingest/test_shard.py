"""From items to committed shards: one row each, bytes untouched, every reason kept."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.verify import verify
from capipe.models.images.decode import ImageLimits
from capipe.stages.ingest.image_check import ImageCheck
from capipe.stages.ingest.shard import IngestConfig, ingest_item
from capipe.stages.ingest.source_refs import Handles, Item

from ...conftest import photo
from ...models.images.test_icc import apart, seen
from ...models.images.test_png import METADATA
from ...profiles import PERMUTED, SRGB_CURVE, rgb_profile, stored
from ..ingesting import ingest, members, rows


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


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


def test_pictures_with_much_metadata_are_sound_and_keep_their_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in METADATA.items():
        (folder / f"{name}.png").write_bytes(data)
    ingest(folder, out=tmp_path / "out")
    found, data = rows(tmp_path / "out"), members(tmp_path / "out")
    assert [(row["status"], row["error"]) for row in found] == [("ok", None)] * len(METADATA)
    for row in found:
        assert data[f"{row['key']}.png"] == METADATA[Path(row["source"]).stem]


def test_a_picture_under_a_profile_has_its_srgb_twins_hash(tmp_path: Path) -> None:
    picture = np.asarray(Image.open(io.BytesIO(photo(3))).convert("RGB"))
    profile, folder = rgb_profile(PERMUTED, SRGB_CURVE), tmp_path / "in"
    folder.mkdir()
    under = encode(Image.fromarray(stored(picture, PERMUTED, SRGB_CURVE)), "PNG", icc_profile=profile)
    (folder / "a.png").write_bytes(encode(Image.fromarray(picture), "PNG"))
    (folder / "b.png").write_bytes(under)
    ingest(folder, out=tmp_path / "out")
    plain, converted = rows(tmp_path / "out")
    assert plain["phash"] == converted["phash"] and plain["uid"] != converted["uid"]
    data = members(tmp_path / "out")[f"{converted['key']}.png"]
    assert data == under and apart(seen(data), picture) <= 2


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
    assert found["nowhere.jpg"]["status"] == "read_error" and "cannot be read" in found["nowhere.jpg"]["error"]
    assert {name: found[name]["status"] for name in GOOD_FILES} == dict.fromkeys(GOOD_FILES, "ok")
    assert found["really_a_png.jpg"]["format"] == "png"
    assert (found["turned.jpg"]["width"], found["turned.jpg"]["height"]) == (64, 48)
    data = members(out)
    assert sorted(name.partition(".")[2] for name in data) == sorted(["jpg"] * 2 + ["png"] * 3 + ["txt", "json"] * 5)
    assert event.record.rows == {
        "corrupt": 2,
        "ok": 5,
        "read_error": 1,
        "too_large": 1,
        "too_small": 1,
        "unsupported": 4,
    }


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
    assert found[0]["text"] == "caf�" and "text is not UTF-8: replaced" in found[0]["error"]
    assert "not an object" in found[1]["error"] and "unreadable" in found[2]["error"]
    assert found[3]["error"] is None and all("nested too deeply" in row["error"] for row in found[4:])
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
    ("error", "status", "reason"),
    [
        (OSError(5, "Input/output error"), "read_error", "cannot be read: Input/output error"),
        (OSError(36, "File name too long"), "unsupported", "cannot be read: File name too long"),
        (MemoryError("9 GB"), "read_error", "cannot be read: out of memory (9 GB)"),
        (TimeoutError(), "read_error", "cannot be read: TimeoutError"),
        (ImportError("Install s3fs to access S3"), "read_error", "cannot be read: Install s3fs to access S3"),
        (KeyError("image"), "corrupt", "unexpected KeyError: 'image'"),
    ],
)
def test_whatever_an_item_raises_becomes_its_row(error: Exception, status: str, reason: str) -> None:
    row, files = ingest_item(_Explosive(error), "k", ImageCheck(ImageLimits()), Handles())
    assert (row["status"], row["error"], row["source"], files) == (status, reason, "somewhere", None)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_out_inside_the_source_is_refused(photos: Path) -> None:
    with pytest.raises(BadInput, match=r"lies in .*photos, which is to be read"):
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
