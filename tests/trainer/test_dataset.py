"""What is trained on: images with questions, by reference; an order that depends on the step alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand
from capipe.trainer.dataset import Example, PromptSampler, load_captioned, load_examples

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


def test_further_images_depend_on_the_place_alone_and_are_not_the_steps_own() -> None:
    prompts = PromptSampler(count=40, batch=4, seed=1)
    places = prompts.refills(3, 2)
    assert places == PromptSampler(40, 4, 1).refills(3, 2) != prompts.refills(4, 2)
    assert [len(place) for place in places] == [2, 2, 2, 2]
    taken = [index for place in places for index, _ in place]
    assert len(set(taken)) == 8 and not set(taken) & set(prompts.indices(3))
    few = PromptSampler(count=5, batch=4, seed=1)  # one other image: all places take it, with other captions
    listed = [pair for place in few.refills(0, 2) for pair in place]
    assert {index for index, _ in listed} == {*range(5)} - {*few.indices(0)}
    assert sorted(turn for _, turn in listed) == list(range(8))
    none = PromptSampler(count=2, batch=3, seed=1)  # the step has all images already
    assert len({*none.sample(0), *(pair for place in none.refills(0, 2) for pair in place)}) == 9


GIVEN = {  # captions by image: name, text, status
    "one": [("long#0", "A.", "ok"), ("long#1", "B.", "ok"), ("short#0", "C", "ok")],
    "two": [("long#0", "D.", "truncated"), ("long#1", "", "empty")],
    "three": [("long#0", "E e e", "degenerate"), ("long#1", "F.", "ok")],
}


def annotated(folder: Path, prompts: tuple[str, ...] = ("long", "short")) -> tuple[str, str]:
    """Three images, and captions of some prompts about them."""
    tar = folder / "a.tar"
    tar.write_bytes(tar_bytes({f"{name}.jpg": name.encode() for name in GIVEN}))
    semantic = {"input": None, "annotate": {"prompts": [{"name": name, "text": "Write."} for name in prompts]}}
    artifact = Artifact.create(str(folder / "captions"), "annotate", semantic, {"shards": str(tar), "shards_total": 1})
    (shard,) = expand(str(tar))
    reader = RowReader(shard)
    with artifact.begin(shard.name, ANNOTATE) as made:
        for row in reader:
            captions = [{"name": name, "text": text, "status": status} for name, text, status in GIVEN[row.key]]
            made.write({"key": row.key, "uid": row.uid, "status": "ok", "error": None, "captions": captions})
        made.commit(rows_in=len(GIVEN), input_info=reader.info)
    artifact.close()
    return str(tar), artifact.url


def test_captions_to_imitate_are_the_good_ones_of_one_prompt(tmp_path: Path) -> None:
    tar, captions = annotated(tmp_path)
    found = load_captioned(tar, captions, "long")
    assert [(example.key, example.captions) for example in found.examples] == [
        ("one", ("A.", "B.")),
        ("three", ("F.",)),
    ]
    assert found.without == 1 and found.examples[0].read() == b"one"
    assert load_captioned(tar, captions, "short", found.fingerprint).examples[0].captions == ("C",)
    (tmp_path / "single").mkdir()
    alone = annotated(tmp_path / "single", ("long",))
    assert load_captioned(*alone).examples[0].captions == ("A.", "B.")


def test_captions_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    tar, captions = annotated(tmp_path)
    for name, said in (
        (None, "which prompt's captions to imitate is not said"),
        ("brief", "data.prompt_name is 'brief'"),
    ):
        with pytest.raises(BadInput, match=f"captions: {said}; set data.prompt_name to one of long, short$"):
            load_captioned(tar, captions, name)
    with pytest.raises(BadInput, match=r"its fingerprint is .*, not 0123; .*fix `data\.fingerprint`"):
        load_captioned(tar, captions, "long", "0123")
    Path(tar).write_bytes(tar_bytes({f"{name}.jpg": name.upper().encode() for name in GIVEN}))
    with pytest.raises(ArtifactMismatch, match="row 'one' expected, 'one' of another image found"):
        load_captioned(tar, captions, "long")
    other = Artifact.create(str(tmp_path / "other"), "embed", {}, {})
    other.close()
    with pytest.raises(BadInput, match=r"an artifact of stage 'embed'; data\.captions takes `capipe annotate`'s"):
        load_captioned(tar, other.url)
