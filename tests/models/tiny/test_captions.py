from __future__ import annotations

import re
from random import Random

from capipe.models.tiny.world.captions import dense_caption, short_caption
from capipe.models.tiny.world.scenes import Scene, Thing, scenes


def test_captions_are_whole_sentences() -> None:
    rng = Random(0)
    for scene in scenes("train", 300, seed=0):
        for caption in (dense_caption(scene, rng), short_caption(scene, rng)):
            assert caption.endswith(".")
            assert all(sentence[0].isupper() for sentence in caption.split(". "))
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", caption), caption


def test_short_captions_are_one_sentence() -> None:
    rng = Random(0)
    assert all(short_caption(scene, rng).count(".") == 1 for scene in scenes("train", 300, seed=0))


def test_wording_varies_and_is_repeatable() -> None:
    scene = next(scene for scene in scenes("train", 200, seed=0) if len(scene.things) == 3 and scene.sign)
    rng = Random(0)
    assert len({dense_caption(scene, rng) for _ in range(200)}) > 100
    assert dense_caption(scene, Random(5)) == dense_caption(scene, Random(5))


def test_one_thing_is_singular() -> None:
    scene = Scene("gray", (Thing("center", "star", "orange", "small"),))
    captions = {dense_caption(scene, Random(seed)) for seed in range(100)}
    assert any("There is one shape on a gray background." in caption for caption in captions)
    assert not any(re.search(r"one \w+s\b| are ", caption) for caption in captions)
