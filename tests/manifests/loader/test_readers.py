"""Third-party readers of what the loader gives: `datasets`, torch's and webdataset's pipelines."""

from __future__ import annotations

import io
import json
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, default_collate

import capipe
from capipe.manifests.loader.dataset import ImageCaptions

from ...stages.scored import clip
from .captioned import ROWS, Captioned, keys

MIX = {"re": 0.7, "org": 0.3}


def opened(data: Captioned, **options: Any) -> ImageCaptions:
    given: dict[str, Any] = {"captions": data.captions, "scores": data.scores, "mix": MIX, "columns": ["clip_score"]}
    return capipe.open_dataset(data.shards, **{**given, **options})


def test_datasets(data: Captioned) -> None:
    dataset = opened(data)
    ours = {each["key"]: each for each in dataset}
    read = dataset.as_datasets()
    assert isinstance(read, datasets.IterableDataset) and read.num_shards == 8
    theirs = {each["key"]: each for each in read}
    assert theirs.keys() == ours.keys() and len(theirs) == ROWS
    for key, each in theirs.items():
        mine = ours[key]
        assert all(each[name] == mine[name] for name in ("uid", "caption", "caption_name", "scores"))
        assert json.loads(each["json"]) == mine["json"]
        assert np.array_equal(np.asarray(each["image"]), np.asarray(Image.open(io.BytesIO(mine["image"]))))
    raw = {each["key"]: each["image"]["bytes"] for each in read.cast_column("image", datasets.Image(decode=False))}
    assert raw == {key: each["image"] for key, each in ours.items()}


@pytest.mark.parametrize("workers", [0, 4])
def test_datasets_in_a_loader(workers: int, data: Captioned) -> None:
    read = opened(data).as_datasets(4).select_columns(["key", "caption"])
    batches = DataLoader(read, 3, num_workers=workers, collate_fn=list)
    assert sorted(keys(batches)) == sorted(each["key"] for each in opened(data))


def test_datasets_resume_by_their_own_state(data: Captioned) -> None:
    read = opened(data).as_datasets(3).select_columns(["key"])
    whole = [each["key"] for each in read]
    for _ in islice(read, 10):
        state = read.state_dict()
    again = opened(data).as_datasets(3).select_columns(["key"])
    again.load_state_dict(state)
    assert [each["key"] for each in again] == whole[10:]


def test_datasets_of_ranks_and_epochs(data: Captioned) -> None:
    parts = [opened(data, rank=rank, world=2) for rank in range(2)]
    assert sorted(each["key"] for part in parts for each in part.as_datasets(2)) == sorted(
        each["key"] for each in opened(data)
    )
    before = [each["key"] for each in parts[0].as_datasets(1)]
    parts[0].set_epoch(1)
    assert [each["key"] for each in parts[0].as_datasets(1)] != before


def test_without_scores(data: Captioned) -> None:
    read = capipe.open_dataset(data.shards, captions=data.captions).as_datasets(1)
    assert set(next(iter(read))) == {"key", "uid", "image", "caption", "caption_name", "json"}


def test_a_pipeline_of_webdataset(data: Captioned) -> None:
    dataset = opened(data, decode="array")
    pipeline = webdataset.DataPipeline(
        dataset,
        webdataset.select(lambda sample: sample["scores"]["clip_score"] > 0.5),
        webdataset.to_tuple("image", "caption"),
        webdataset.batched(4),
    )
    batches = list(pipeline)
    assert sum(len(captions) for _, captions in batches) == sum(clip(number) > 0.5 for number in range(ROWS))
    assert batches[0][0].shape == (4, 64, 96, 3)


def test_collation_by_torch(data: Captioned) -> None:
    """Arrays of one size, texts and numbers need no function of one's own."""

    def without_json(batch: list[dict[str, object]]) -> object:
        return default_collate([{name: value for name, value in each.items() if name != "json"} for each in batch])

    loader = DataLoader(opened(data, decode="array"), 4, num_workers=2, collate_fn=without_json)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 64, 96, 3) and len(batch["caption"]) == 4
    assert batch["scores"]["clip_score"].shape == (4,)
