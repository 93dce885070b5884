"""Who repeats whom, on sets whose copies are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.tar import TarWriter
from capipe.manifests.shards import expand
from capipe.models.images.decode import ImageLimits, Thumbnail, thumbnail
from capipe.stages.dedup.groups import Contents, keepers
from capipe.stages.dedup.hash_sets import read_hash_set
from capipe.stages.dedup.marks import DedupConfig, find_marks, hash_shard, mark_shard
from capipe.stages.dedup.perceptual_hash import DECODED_SIDE, Looks, looks
from capipe.stages.dedup.signatures.confirm import same_picture

from ...conftest import photo
from ...models.images.test_decode import encode, scene
from ...profiles import PERMUTED, PROPHOTO, SRGB_CURVE, muted, rgb_profile, stored
from ..copies import COPIES, NEAR, copies, originals
from ..near import searched

Rows = dict[str, dict[str, Any]]


def tars(folder: Path, images: Iterable[tuple[str, bytes]], per_shard: int = 50) -> Path:
    folder.mkdir(parents=True)
    every = list(images)
    for number, start in enumerate(range(0, len(every), per_shard)):
        with (folder / f"{number:05}.tar").open("wb") as file:
            writer = TarWriter(file)
            for key, data in every[start : start + per_shard]:
                writer.add(f"{key}.jpg", data)
            writer.finish()
    return folder


def marked(shards: Path, out: Path, **config: Any) -> Rows:
    """Both passes over a folder of tars, in this process."""
    hashes = Artifact.create(str(out / "hashes"), "hash", {}, {})
    marks = Artifact.create(str(out / "marked"), "dedup", {}, {})
    found = expand(str(shards))
    for shard in found:
        hash_shard(shard, hashes)
    hashed, options = read_hash_set(hashes, [each.name for each in found]), DedupConfig(**config)
    groups = find_marks(hashed, None, options, searched(out / "near", hashed, radius=options.radius))
    for name, record in hashes.committed().items():
        mark_shard(name, record, groups, marks)
    rows = {row["key"]: row for shard in marks.committed() for row in marks.read_rows(shard)}
    hashes.close()
    marks.close()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 112])
def test_copies_are_found_and_what_is_only_near_is_not(size: int, tmp_path: Path) -> None:
    """Recall by kind of copy; precision over these copies and the near scenes, each differing in one thing."""
    images: dict[str, bytes] = {}
    truth: dict[str, tuple[int, str]] = {}  # of every picture the original it is of, or its own, and its kind
    for number, (original, near) in enumerate(originals(scenes_=100, photos=50 * (size == 256), size=size, seed=21)):
        pictures = {"original": original, **copies(original), **near}
        for kind, data in pictures.items():
            key = f"{number:03}-{len(truth):05}"
            images[key], truth[key] = data, (number, kind)
    rows = marked(tars(tmp_path / "in", images.items(), 200), tmp_path / "out")
    group = {key: rows[key]["group"] for key in truth}
    home = {number: group[key] for key, (number, kind) in truth.items() if kind == "original"}
    total, with_original, strangers = Counter[str](), Counter[str](), 0
    for key, (number, kind) in truth.items():
        total[kind] += 1
        with_original[kind] += group[key] == home[number]
        strangers += group[key] in {other for n, other in home.items() if n != number}
    recall = {kind: with_original[kind] / total[kind] for kind in COPIES}
    merged = {kind: with_original[kind] / total[kind] for kind in NEAR}
    right, wrong = sum(with_original[kind] for kind in COPIES), strangers + sum(with_original[kind] for kind in NEAR)
    print(f"recall {recall}; near scenes merged {merged}; other scenes merged {strangers}; pairs {right}+{wrong}")
    assert recall["exact"] == 1.0
    assert all(share >= 0.95 for share in recall.values()), recall
    assert right / (right + wrong) >= 0.99
    assert all(share <= 0.02 for share in merged.values()), merged
    assert len(set(home.values())) == len(home)


def test_one_picture_under_several_profiles_is_one_picture(tmp_path: Path) -> None:
    picture, images = muted(scene(256, 192, 5)), {}
    images["plain"] = encode(picture, quality=90)
    for name, primaries, gamma in (("wide", PROPHOTO, 1.8), ("permuted", PERMUTED, SRGB_CURVE)):
        under = stored(picture, primaries, gamma)
        images[name] = encode(under, quality=90, icc_profile=rgb_profile(primaries, gamma))
        images[f"{name} unsaid"] = encode(under, quality=90)
    rows = marked(tars(tmp_path / "in", images.items()), tmp_path / "out")
    assert len({rows[name]["group"] for name in ("plain", "wide", "permuted")}) == 1
    assert rows["permuted unsaid"]["group"] != rows["plain"]["group"]


def test_the_order_of_shards_and_rows_changes_nothing(tmp_path: Path) -> None:
    every = [
        (f"{n}-{m}", data)
        for n, (original, near) in enumerate(originals(scenes_=8, photos=4, size=128, seed=9))
        for m, data in enumerate([original, original, *copies(original).values(), *near.values()])
    ]
    wanted = marked(tars(tmp_path / "a", every, 20), tmp_path / "a-out")
    shuffled = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    assert marked(tars(tmp_path / "b", shuffled, 7), tmp_path / "b-out") == wanted
    assert Counter(row["status"] for row in wanted.values())["duplicate"] >= 12 * 5


def test_images_that_are_all_equal(tmp_path: Path) -> None:
    shards = tars(tmp_path / "in", [(f"{n:02}", photo(1)) for n in range(30)], 7)
    rows = marked(shards, tmp_path / "few", placeholder=30)
    assert [key for key, row in rows.items() if row["status"] == "ok"] == ["00"]
    assert {row["copies"] for row in rows.values()} == {30} and len({row["group"] for row in rows.values()}) == 1
    assert rows["29"]["duplicate_of"] == "00" and rows["29"]["error"] == "the same bytes as 00"
    rows = marked(shards, tmp_path / "many", placeholder=29)
    assert {(row["status"], row["error"]) for row in rows.values()} == {
        ("duplicate", "placeholder: these bytes occur 30 times")
    }


def test_what_cannot_be_decoded_keeps_its_row_and_joins_no_group(tmp_path: Path) -> None:
    broken = photo(1)[:200]
    rows = marked(
        tars(tmp_path / "in", [("a", photo(1)), ("b", broken), ("c", broken), ("d", b"<html>")]), tmp_path / "o"
    )
    assert [rows[key]["status"] for key in "abcd"] == ["ok", "corrupt", "corrupt", "unsupported"]
    assert all(rows[key]["group"] is None and rows[key]["error"] for key in "bcd")


def test_nothing_that_can_be_decoded(tmp_path: Path) -> None:
    rows = marked(tars(tmp_path / "in", [("a", b"<html>")]), tmp_path / "out")
    assert rows["a"]["status"] == "unsupported"


def test_the_largest_copy_is_kept_then_the_lowest_uid(tmp_path: Path) -> None:
    small, large = photo(3, (160, 120)), photo(3, (320, 240))
    rows = marked(tars(tmp_path / "in", [("a", small), ("b", large), ("c", small)]), tmp_path / "out")
    assert [rows[key]["status"] for key in "abc"] == ["duplicate", "ok", "duplicate"]
    assert {row["group"] for row in rows.values()} == {rows["b"]["uid"]}
    assert rows["a"]["duplicate_of"] == rows["c"]["duplicate_of"] == "b"
    uids = np.array([b"2", b"1", b"3"], dtype="S16")
    zeros = np.zeros(3, dtype=np.uint64)
    contents = Contents(np.sort(uids), np.array([5, 9, 9]), zeros, zeros, zeros)
    assert keepers(contents, np.zeros(3, dtype=np.int64)).tolist() == [1, 1, 1]


def test_equal_keys_in_two_shards_are_two_rows(tmp_path: Path) -> None:
    shards = tars(tmp_path / "in", [("a", photo(1))])
    (shards / "00001.tar").write_bytes((shards / "00000.tar").read_bytes())
    hashes = Artifact.create(str(tmp_path / "hashes"), "hash", {}, {})
    out = Artifact.create(str(tmp_path / "marked"), "dedup", {}, {})
    for shard in expand(str(shards)):
        hash_shard(shard, hashes)
    hashed = read_hash_set(hashes, ["00000", "00001"])
    marks = find_marks(hashed, None, DedupConfig(), searched(tmp_path / "near", hashed))
    statuses = [mark_shard(name, record, marks, out).rows for name, record in hashes.committed().items()]
    assert statuses == [{"ok": 1}, {"duplicate": 1}]


def seen(data: bytes) -> Looks:
    small = thumbnail(data, ImageLimits(min_side=1), DECODED_SIDE)
    assert isinstance(small, Thumbnail)
    return looks(small.image)


def test_pictures_are_compared_the_same_both_ways_round() -> None:
    pictures = [seen(data).signature for seed in range(3) for data in copies(photo(seed, (320, 240))).values()]
    signatures = np.stack([np.frombuffer(each, dtype=np.uint8) for each in pictures])
    i, j = (each.ravel() for each in np.indices((len(pictures), len(pictures))))
    forth, back = same_picture(signatures[i], signatures[j]), same_picture(signatures[j], signatures[i])
    assert (forth == back).all()
    assert (forth == (i // len(COPIES) == j // len(COPIES))).mean() > 0.9 and forth[i == j].all()


def test_the_inner_hash_is_that_of_a_cropped_copy() -> None:
    whole, cropped = (seen(copies(photo(4, (320, 240)))[kind]) for kind in ("exact", "cropped 4 %"))
    assert (whole.inner ^ cropped.phash).bit_count() <= 2 < (whole.phash ^ cropped.phash).bit_count()
