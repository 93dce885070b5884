"""What training sees: every image once, with its own caption and scores, by any ranks and workers, in a fixed order."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

import capipe
from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.loader.dataset import ImageCaptions
from capipe.manifests.loader.images import array
from capipe.manifests.loader.order import Tail
from capipe.manifests.loader.rows import RowCounts
from capipe.manifests.shards import RowReader, expand
from capipe.models.images.decode import ImageLimits, decode_upright

from ...conftest import photo, tar_bytes
from ...stages.scored import clip, plain, write_marks, write_scores
from .captioned import ROWS, Captioned, joined, keys, loaded, write_captions


def opened(data: Captioned, **options: Any) -> ImageCaptions:
    return capipe.open_dataset(data.shards, **{"captions": data.captions, "scores": data.scores, **options})


def everything(data: Captioned) -> list[str]:
    return [row.key for shard in expand(str(data.shards)) for row in RowReader(shard)]


def test_a_sample(data: Captioned) -> None:
    samples = {sample["key"]: sample for sample in opened(data)}
    rows = {row.key: row for shard in expand(str(data.shards)) for row in RowReader(shard)}
    assert samples.keys() == rows.keys() and len(samples) == ROWS
    for number, (key, row) in enumerate(rows.items()):
        sample = samples[key]
        assert list(sample) == ["key", "uid", "image", "caption", "caption_name", "scores", "json"]
        assert sample["image"] == row.image and sample["uid"] == row.uid and sample["json"] == row.meta
        assert (sample["caption"], sample["caption_name"]) == (f"dense caption by m of {row.uid}", "re")
        assert sample["scores"]["re_clip_score"] == pytest.approx(clip(number), abs=1e-6)
        assert sample["scores"]["re_itm_score"] is None and "width" not in sample["scores"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 4])
def test_every_sample_once(ranks: int, workers: int, data: Captioned) -> None:
    parts = [opened(data, rank=rank, world=ranks) for rank in range(ranks)]
    seen = [keys(loaded(part, workers)) for part in parts]
    assert [len(part) for part in seen] == [ROWS // ranks] * ranks == [len(part) for part in parts]
    assert sorted(key for part in seen for key in part) == sorted(everything(data))


@pytest.mark.parametrize("tail", ["drop", "repeat"])
@pytest.mark.parametrize("world", [3, 7, 30])
def test_ranks_have_equal_counts(world: int, tail: Tail, data: Captioned) -> None:
    """With more ranks than shards, too: a shard is then read by several."""
    seen: list[str] = []
    for rank in range(world):
        part = opened(data, rank=rank, world=world, tail=tail)
        own = keys(loaded(part, workers=2 if rank == 1 else 0))
        assert len(own) == len(part) == (ROWS // world if tail == "drop" else -(-ROWS // world))
        seen += own
    most = max(Counter(seen).values())
    if tail == "drop":
        assert most == 1 and ROWS - len(seen) < world
    else:
        assert most == 2 and set(seen) == set(everything(data)) and len(seen) - ROWS < world


def test_another_tail_is_dropped_each_epoch(data: Captioned) -> None:
    dropped = set()
    for epoch in range(4):
        seen: set[str] = set()
        for rank in range(3):
            part = opened(data, rank=rank, world=3)
            part.set_epoch(epoch)
            seen |= {sample["key"] for sample in part}
        dropped |= set(everything(data)) - seen
    assert len(dropped) > 2


def test_an_order_is_that_of_seed_and_epoch(data: Captioned) -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[str]:
        dataset = opened(data, seed=seed, **options)
        dataset.set_epoch(epoch)
        return [sample["key"] for sample in dataset]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(each) for each in orders}) == 4 and orders[3] == order(1, 1)
    assert order(0, 0, shuffle=0) == order(1, 3, shuffle=0) == everything(data)
    assert order(0, 0, shuffle=2) not in (orders[0], everything(data))


def test_workers_that_live_on_see_the_next_epoch(data: Captioned) -> None:
    dataset = opened(data)
    loader = loaded(dataset, workers=2, persistent_workers=True)
    first, again = keys(loader), keys(loader)
    dataset.set_epoch(1)
    second = keys(loader)
    assert first == again != second and sorted(first) == sorted(second) == sorted(everything(data))


def test_captions_by_weight_and_epoch(data: Captioned) -> None:
    dataset = opened(data, mix={"dense": 0.5, "short": 0.25, "org": 0.25})
    names = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        samples = list(dataset)
        names.append({sample["key"]: sample["caption_name"] for sample in samples})
        for sample in samples:
            text = "alt " if sample["caption_name"] == "org" else f"{sample['caption_name']} caption by m of "
            assert sample["caption"].startswith(text)
    counts = Counter(name for each in names for name in each.values())
    assert 0.4 < counts["dense"] / (8 * ROWS) < 0.6 and len(counts) == 3
    assert names[0] != names[1]
    by_worker = {sample["key"]: sample["caption_name"] for batch in loaded(dataset, 3) for sample in batch}
    assert by_worker == names[7]  # whoever reads it


def test_images_without_a_caption(data: Captioned, tmp_path: Path) -> None:
    """One that lacks some takes the others; one that lacks all is left out, and counted."""
    write_captions(data.shards, tmp_path / "captions", lambda i, name: i % 4 == 0 or (i % 4 == 1 and name == "dense"))
    dataset = capipe.open_dataset(data.shards, captions=tmp_path / "captions", mix={"dense": 0.9, "short": 0.1})
    assert dataset.counts == RowCounts(rows=ROWS, without_caption=ROWS // 4, selected=ROWS * 3 // 4)
    names = {sample["key"]: sample["caption_name"] for sample in dataset}
    for index, key in enumerate(everything(data)):
        assert names.get(key) in ((None,), ("short",), ("dense", "short"), ("dense", "short"))[index % 4]
    first = {sample["key"]: sample["caption"].split()[0] for sample in opened(data, captions=tmp_path / "captions")}
    assert set(first.values()) == {"dense", "short"} and len(first) == ROWS * 3 // 4  # `re` is the first ok one


def test_several_artifacts_of_captions(data: Captioned, tmp_path: Path) -> None:
    write_captions(data.shards, tmp_path / "other", model="other")
    captions = {"a": str(data.captions), "b": str(tmp_path / "other")}
    dataset = capipe.open_dataset(data.shards, captions=captions, mix={"a": 1, "b/short": 1, "org": 1})
    begins = {"a": "dense caption by m", "b/short": "short caption by other", "org": "alt"}
    samples = list(dataset)
    assert {sample["caption_name"] for sample in samples} == set(begins)
    assert all(sample["caption"].startswith(begins[sample["caption_name"]]) for sample in samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_condition(workers: int, data: Captioned) -> None:
    """As in `capipe filter`: `clip_score` is that of the new caption."""
    dataset = opened(data, where='clip_score > 0.5 and re_language == "en" and width >= 64')
    kept = [key for number, key in enumerate(everything(data)) if clip(number) > 0.5 and number % 4]
    assert sorted(keys(loaded(dataset, workers))) == sorted(kept)
    assert dataset.counts == RowCounts(rows=ROWS, filtered=ROWS - len(kept), selected=len(kept))


def test_unprefixed_scores_are_of_the_caption_that_is_read(data: Captioned) -> None:
    new, old = (opened(data, where="clip_score > 0.3", mix={name: 1}) for name in ("re", "org"))
    assert len(new) == sum(clip(number) > 0.3 for number in range(ROWS))
    assert len(old) == sum(clip(number) / 3 > 0.3 for number in range(ROWS)) != len(new)


def test_scores_of_a_sample(data: Captioned) -> None:
    dataset = opened(data, columns=["clip_score", "re_language", "width"])
    assert {tuple(sample["scores"]) for sample in dataset} == {("clip_score", "re_language", "width")}
    assert {sample["scores"]["width"] for sample in dataset} == {96}
    assert all(sample["scores"] == {} for sample in opened(data, columns=[]))


def test_rows_that_marks_and_failures_leave_out(data: Captioned, tmp_path: Path) -> None:
    marks = write_marks(data.shards, tmp_path / "marks", lambda i, row: {"status": "duplicate"} if i % 8 == 0 else {})
    write_scores(
        data.shards,
        tmp_path / "scores",
        lambda i, row: {**plain(i, row), "status": ("corrupt", "withdrawn", "engine_error", "ok")[i % 4]},
    )
    dataset = opened(data, scores=[marks.url, str(tmp_path / "scores")])
    away = [number for number in range(ROWS) if number % 8 == 0 or number % 4 in (0, 1)]
    assert dataset.counts == RowCounts(rows=ROWS, left_out=len(away), selected=ROWS - len(away))
    assert len(list(dataset)) == ROWS - len(away)


def test_rows_that_the_captions_marks_left_out_are_left_out(data: Captioned, tmp_path: Path) -> None:
    """Although their original caption is in the mix."""
    write_captions(data.shards, tmp_path / "captions", left_out=[3, 4])
    dataset = capipe.open_dataset(data.shards, captions=tmp_path / "captions", mix={"org": 1})
    assert dataset.counts.left_out == 2 and len(dataset) == ROWS - 2


@pytest.mark.parametrize("where", [None, "clip_score > 0.2"])
def test_counts_are_those_of_reading(where: str | None, data: Captioned, tmp_path: Path) -> None:
    """Manifests tell them without a sidecar being opened where all rows are ok; kept in a file, they are not counted
    again."""
    kept = tmp_path / "counts.json"
    counted = opened(data, where=where, counts=kept)
    assert counted.counts.selected == len(list(counted)) and kept.exists()
    again = opened(data, where=where, counts=kept)
    assert again.counts == counted.counts and [each["key"] for each in again] == [each["key"] for each in counted]


def test_pixels(tmp_path: Path) -> None:
    """Upright, as the captioner saw them."""
    turned, out = Image.fromarray(np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(out, "JPEG", exif=exif)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/00000.tar").write_bytes(tar_bytes({"a.jpg": out.getvalue(), "b.png": photo(1, fmt="PNG")}))
    made = joined(tmp_path, tmp_path / "in")
    arrays = {each["key"]: each["image"] for each in opened(made, decode="array", mix={"dense": 1})}
    pictures = {each["key"]: each["image"] for each in opened(made, decode="pil", mix={"dense": 1})}
    assert arrays["a"].shape == (96, 64, 3) and arrays["b"].shape == (64, 96, 3) and arrays["a"].dtype == np.uint8
    seen = decode_upright(out.getvalue(), ImageLimits())
    assert isinstance(seen, Image.Image) and np.array_equal(arrays["a"], np.asarray(seen))
    assert all(np.array_equal(np.asarray(pictures[key]), arrays[key]) for key in arrays)
    lengths = {each["key"]: each["image"] for each in opened(made, decode=len)}
    assert lengths["a"] == len(out.getvalue())


def test_one_shard_is_joined_at_a_time(data: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of all rows: of each sidecar only the shard that is being read is in memory."""
    from capipe.manifests.loader import stream

    made: list[str] = []
    given, pulled = stream.selected_rows, [0]

    def reading(*arguments: Any) -> Any:
        made.append(arguments[0].name)
        assert pulled[0] >= 9 * (len(made) - 1)  # all rows of those before have been taken
        return given(*arguments)

    monkeypatch.setattr(stream, "selected_rows", reading)
    for pulled[0], _ in enumerate(opened(data, shuffle=0), 1):
        pass
    assert made == ["00000", "00001", "00002", "00003"]


def test_importing_capipe_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, capipe; print('torch' in sys.modules, callable(capipe.open_dataset), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="open_datasets"):
        capipe.open_datasets  # noqa: B018


def test_ranks_come_from_the_environment(data: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = [each["key"] for each in opened(data, rank=1, world=2)]
    assert [each["key"] for each in opened(data)] == given and len(given) == ROWS // 2


def test_ranks_come_from_torch(data: Captioned, tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert len(opened(data)) == ROWS
    finally:
        dist.destroy_process_group()


def digest(samples: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(repr([(s["key"], s["caption"], s["image"]) for s in samples]).encode()).hexdigest()


def test_equal_runs_give_equal_bytes(data: Captioned) -> None:
    assert len({digest(list(opened(data, mix={"re": 0.7, "org": 0.3}))) for _ in range(2)}) == 1


def test_where_files_lie_decides_nothing(data: Captioned, tmp_path: Path) -> None:
    """A copy elsewhere has the same order, and goes on from the same state."""
    import shutil

    copy = Captioned(*(tmp_path / name for name in ("shards", "captions", "scores")))
    for here, there in zip(data, copy, strict=True):
        shutil.copytree(here, there)
    mine, theirs = opened(data), opened(copy)
    theirs.load_state_dict(mine.state_dict(delivered=5))
    assert [each["key"] for each in mine][5:] == [each["key"] for each in theirs]
    assert Artifact.open(str(copy.captions)).stage == "annotate"


def test_damaged_exif_turns_nothing() -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(out, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert array(out.getvalue()).shape == (40, 60, 3)


@pytest.mark.slow
def test_workers_that_are_new_interpreters(data: Captioned) -> None:
    """They get the data set by pickle, and see the epoch all the same."""
    dataset = opened(data, where="clip_score > 0.2", mix={"dense": 1, "org": 1}, decode="array")
    loader = loaded(dataset, workers=1, persistent_workers=True, multiprocessing_context="spawn")
    first = keys(loader)
    dataset.set_epoch(1)
    second = keys(loader)
    assert first != second and second == [each["key"] for each in dataset]


def test_a_copy_by_pickle(data: Captioned) -> None:
    dataset = opened(data, where="clip_score > 0.2", mix={"dense": 1, "org": 1}, decode="pil")
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [each["key"] for each in copy] == [each["key"] for each in dataset] and copy.epoch == 3


def test_a_state_is_not_taken_in_a_worker(data: Captioned) -> None:
    """As loaders do that ask their workers' copies of a data set: these know nothing of what was delivered."""
    dataset = opened(data)
    loader = DataLoader(dataset, 1, num_workers=1, collate_fn=list, worker_init_fn=lambda worker: _asked())
    with pytest.raises(BadInput, match="not in a DataLoader worker"):
        list(loader)


def _asked() -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.state_dict()
