"""What can be read: shards of ours and of others, an index, final shards, packed captions, an object store."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

import capipe
from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.loader.rows import RowCounts
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand, uid_of
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.commands.run_job import Exit
from capipe.stages.filter.select import SelectConfig

from ...conftest import photo, tar_bytes
from ...stages.ingesting import ingest
from ...stages.scored import clip, foreign_shards
from .captioned import Captioned, ingested, joined, keys, loaded, write_captions

KEEP = "clip_score > 0.4"
SIZES = [10, 4, 12, 6]
KEPT = [number for number in range(sum(SIZES)) if clip(number) > 0.4]


@pytest.fixture
def foreign(tmp_path: Path) -> Captioned:
    """Tars of another tool, whose rows only captions and scores of ours list."""
    return joined(tmp_path, foreign_shards(tmp_path / "theirs", SIZES))


def select(data: Captioned, out: Path, **options: Any) -> Path:
    config = SelectConfig(**{"keep": KEEP, "shard_size": 9, **options})
    assert select_step(Artifact.open(str(data.scores)), str(data.shards), str(out), config, None, 0) is Exit.OK
    return out


def test_tars_of_another_tool(foreign: Captioned) -> None:
    dataset = capipe.open_dataset(foreign.shards, captions=foreign.captions, mix={"dense": 1, "org": 1})
    samples = {each["key"]: each for each in dataset}
    rows = [row for shard in expand(str(foreign.shards)) for row in RowReader(shard)]
    assert samples.keys() == {row.key for row in rows}
    for number, row in enumerate(rows):
        sample = samples[row.key]
        assert sample["image"] == row.image and sample["json"] == {"n": number, "uid": "theirs"}
        texts = {"dense": f"dense caption by m of {row.uid}", "org": f"alt {number}"}
        assert sample["caption"] == texts[sample["caption_name"]]


def test_a_pattern_of_tars(foreign: Captioned) -> None:
    dataset = capipe.open_dataset(f"{foreign.shards}/{{00001..00002}}.tar", captions=foreign.captions)
    assert len(dataset) == SIZES[1] + SIZES[2] == len(list(dataset))


def test_a_compressed_tar(foreign: Captioned, tmp_path: Path) -> None:
    for path in sorted(foreign.shards.glob("*.tar")):
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    dataset = capipe.open_dataset(foreign.shards, captions=foreign.captions, scores=foreign.scores, where=KEEP)
    assert len(list(dataset)) == len(KEPT)


def test_original_captions_alone(tmp_path: Path) -> None:
    data = ingested(tmp_path)
    samples = list(capipe.open_dataset(data.shards))
    assert {each["caption_name"] for each in samples} == {"org"} and len(samples) == 32
    assert all(each["caption"].startswith("alt ") and each["scores"] == {} for each in samples)


def test_images_that_failed_are_left_out(tmp_path: Path) -> None:
    images = {"a.jpg": photo(0), "b.jpg": b"\xff\xd8\xff", "c.jpg": photo(2), "d.gif": b"GIF89a"}
    members = {**images, **{f"{key}.txt": b"alt" for key in "abcd"}}
    path = tmp_path / "in/00000.tar"
    path.parent.mkdir()
    path.write_bytes(tar_bytes(dict(sorted(members.items()))))
    ingest(path.parent, out=tmp_path / "shards")
    dataset = capipe.open_dataset(tmp_path / "shards")
    assert dataset.counts == RowCounts(rows=4, left_out=2, selected=2)
    assert {each["uid"] for each in dataset} == {uid_of(photo(0)), uid_of(photo(2))}


@pytest.mark.parametrize("whose", ["foreign", "own"])
def test_an_index(whose: str, foreign: Captioned, tmp_path: Path) -> None:
    """Over the original tars; joined with captions that were made of these later, too."""
    data = foreign
    if whose == "own":
        ingest(foreign.shards, out=tmp_path / "ours/shards", shard_size=9)
        data = joined(tmp_path / "ours", tmp_path / "ours/shards")
    index = select(data, tmp_path / "index", index=True)
    rows = [row for shard in expand(str(data.shards)) for row in RowReader(shard)]
    dataset = capipe.open_dataset(index)
    assert dataset.counts == RowCounts(rows=32, left_out=32 - len(KEPT), selected=len(KEPT))
    samples = {each["key"]: each for each in dataset}
    assert samples.keys() == {rows[number].key for number in KEPT}
    for number in KEPT:
        sample = samples[rows[number].key]
        assert (sample["image"], sample["caption_name"]) == (rows[number].image, "caption")
        assert sample["caption"] == f"New caption {number}. It has two sentences."
        assert sample["scores"]["re_clip_score"] == pytest.approx(clip(number), abs=1e-6)
    more = capipe.open_dataset(
        index, captions=data.captions, mix={"dense": 1}, where="clip_score > 0.6", rank=0, world=1
    )
    batches = loaded(more, 2)
    assert sorted(keys(batches)) == sorted(rows[number].key for number in KEPT if clip(number) > 0.6)


def test_an_index_as_scores(foreign: Captioned, tmp_path: Path) -> None:
    """Of the original shards: what it rejected is left out."""
    index = select(foreign, tmp_path / "index", index=True)
    dataset = capipe.open_dataset(foreign.shards, captions=foreign.captions, scores=index)
    assert len(list(dataset)) == len(KEPT) == dataset.counts.selected


def test_final_shards(foreign: Captioned, tmp_path: Path) -> None:
    dataset = capipe.open_dataset(select(foreign, tmp_path / "final"), where="re_clip_score > 0.6")
    samples = list(dataset)
    assert len(samples) == sum(clip(number) > 0.6 for number in KEPT)
    assert {each["caption_name"] for each in samples} == {"caption"}


def test_packed_captions(foreign: Captioned, tmp_path: Path) -> None:
    """Shards of `annotate --pack` are a source of images and captions by themselves."""
    rows = [row for shard in expand(str(foreign.shards)) for row in RowReader(shard)][:3]
    semantic = {"annotate": {"prompts": [{"name": "dense", "text": "?"}]}}
    artifact = Artifact.create(str(tmp_path / "packed"), "annotate", semantic, {})
    with artifact.begin("00000", ANNOTATE, tar=True) as writer:
        for row in rows:
            assert row.image is not None
            caption = {"name": "dense", "text": f"of {row.key}", "status": "ok"}
            base = {"key": row.key, "uid": row.uid, "status": "ok", "text": row.text}
            writer.write({**base, "captions": [caption]}, {row.format: row.image, "json": b"{}"})
        writer.commit(rows_in=3, input_info={"digest": "d"})
    artifact.close()
    assert {each["caption"] for each in capipe.open_dataset(tmp_path / "packed")} == {f"of {row.key}" for row in rows}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_object_store(workers: int, foreign: Captioned, s3: str) -> None:
    """Shards of another tool, captions, scores and the counts, all in a bucket."""
    fs, bucket = fsspec.filesystem("s3", skip_instance_cache=True), f"{s3.removeprefix('s3://')}/loader{workers}"
    for name in ("shards", "captions", "scores"):
        fs.put(str(getattr(foreign, name)), f"{bucket}/{name}", recursive=True)
    places = {name: f"s3://{bucket}/{name}" for name in ("captions", "scores")}
    options: dict[str, Any] = {"where": KEEP, "counts": f"s3://{bucket}/counts.json", **places}
    remote = capipe.open_dataset(f"s3://{bucket}/shards", **options)
    local = capipe.open_dataset(foreign.shards, captions=foreign.captions, scores=foreign.scores, where=KEEP)
    assert keys(loaded(remote, workers)) == keys(loaded(local, workers)) and len(local) == len(KEPT)
    assert fs.exists(f"{bucket}/counts.json")
    assert len(capipe.open_dataset(f"s3://{bucket}/shards", **options)) == len(KEPT)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_tars_that_nothing_lists(foreign: Captioned) -> None:
    with pytest.raises(BadInput, match=r"00000\.tar: not a tar of capipe, and nothing else lists its rows; give capt"):
        capipe.open_dataset(foreign.shards)


def edited(index: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's entries of input shards, as somebody else might."""
    path = index / "_capipe/manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("checksum")
        for entry in line["input"]["shards"]:
            change(entry)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://elsewhere/00000.tar", "in a store that was not named"),
        ("/proc/self/mem", "hold no data"),
        ("reference::x", "chain of file systems"),
        (None, "no path or URL"),
    ],
)
def test_an_index_leads_nowhere_else(url: str | None, problem: str, foreign: Captioned, tmp_path: Path) -> None:
    index = select(foreign, tmp_path / "index", index=True)
    edited(index, lambda entry: entry.update(url=url))
    with pytest.raises(ArtifactMismatch, match=problem):
        list(capipe.open_dataset(index))


def test_tars_of_an_index_that_moved(foreign: Captioned, tmp_path: Path) -> None:
    index = select(foreign, tmp_path / "index", index=True)
    shutil.move(foreign.shards, tmp_path / "moved")
    with pytest.raises(ArtifactMismatch, match="cannot be read"):
        list(capipe.open_dataset(index))
    assert len(list(capipe.open_dataset(index, images=[str(tmp_path / "moved")]))) == len(KEPT)


def test_places_of_images_are_for_an_index(foreign: Captioned) -> None:
    with pytest.raises(BadInput, match="where the tars of an index lie"):
        capipe.open_dataset(foreign.shards, captions=foreign.captions, images="elsewhere")


def test_no_image_has_a_caption(foreign: Captioned, tmp_path: Path) -> None:
    write_captions(foreign.shards, tmp_path / "none", lambda index, name: True)
    with pytest.raises(BadInput, match=r"no row of 32 is selected: 0 have no usable image .* 32 have no caption of"):
        capipe.open_dataset(foreign.shards, captions=tmp_path / "none")


def test_scores_alone_have_captions(foreign: Captioned) -> None:
    samples = list(capipe.open_dataset(foreign.shards, scores=foreign.scores, mix={"re": 0.7, "org": 0.3}))
    assert {each["caption_name"] for each in samples} == {"re", "org"} and len(samples) == 32
