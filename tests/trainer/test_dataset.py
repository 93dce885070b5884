"""What is trained on: images with questions, by reference; an order that depends on the step alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from capipe.errors import BadInput
from capipe.trainer.dataset import Example, PromptSampler, load_examples

from ..conftest import tar_bytes


def test_an_epoch_has_every_task_once_and_each_is_another_order() -> None:
    schedule = PromptSampler(count=10, batch=4, seed=1)
    drawn = [index for step in range(5) for index in schedule.indices(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert schedule.indices(3) == PromptSampler(10, 4, 1).indices(3) != PromptSampler(10, 4, 2).indices(3)
    assert Counter(PromptSampler(3, 7, 0).indices(0)).most_common(1)[0][1] == 3  # a batch larger than the data
    sample = PromptSampler(3, 7, 0).sample(0)
    assert [index for index, _ in sample] == PromptSampler(3, 7, 0).indices(0)
    assert len(set(sample)) == 7 and max(turn for _, turn in sample) == 2


def test_a_task_reads_its_image_and_notices_another_one(tmp_path: Path) -> None:
    from capipe.errors import ArtifactMismatch
    from capipe.manifests.shards import RowReader, expand

    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"one.jpg": b"first image", "one.txt": b"t", "two.jpg": b"second"}))
    (shard,) = expand(str(path))
    rows = list(RowReader(shard))
    examples = [Example(row.uid or "", row.key, shard.url, row.offset, len(row.image or b""), ()) for row in rows]
    assert [example.read() for example in examples] == [b"first image", b"second"]
    path.write_bytes(tar_bytes({"one.jpg": b"other image", "two.jpg": b"second"}))
    with pytest.raises(ArtifactMismatch, match=r"one.*has changed"):
        examples[0].read()


def test_images_alone_are_examples_without_questions(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar_bytes({"one.jpg": b"first image", "one.txt": b"t", "none.txt": b"no image", "two.jpg": b"second"})
    )
    found = load_examples(str(path), None)
    assert [(example.key, example.questions, example.read()) for example in found.examples] == [
        ("one", (), b"first image"),
        ("two", (), b"second"),
    ]
    assert found.without == 1
    assert load_examples(str(path), None, found.fingerprint) == found
    with pytest.raises(BadInput, match=r"a\.tar: the images' fingerprint is .*, not 0123; .*fix `data\.fingerprint`"):
        load_examples(str(path), None, "0123")
    path.write_bytes(tar_bytes({"one.jpg": b"first image", "two.jpg": b"another"}))
    assert load_examples(str(path), None).fingerprint != found.fingerprint
    path.write_bytes(tar_bytes({"one.txt": b"t"}))
    with pytest.raises(BadInput, match=r"a\.tar: none of its 1 rows is an image"):
        load_examples(str(path), None)
