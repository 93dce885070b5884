from __future__ import annotations

import re
from random import Random

from capipe.models.tiny.world.captions import NUMBERS, dense_caption, narrow_caption, short_caption
from capipe.models.tiny.world.grade import grade, parse
from capipe.models.tiny.world.scenes import Scene, Thing, scenes


def test_captions_are_whole_sentences() -> None:
    rng = Random(0)
    for scene in scenes("train", 300, seed=0):
        for caption in (dense_caption(scene, rng), short_caption(scene, rng), narrow_caption(scene, rng)):
            assert caption.endswith(".")
            assert all(sentence[0].isupper() for sentence in caption.split(". "))
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", caption), caption


def test_short_captions_are_one_sentence() -> None:
    rng = Random(0)
    assert all(short_caption(scene, rng).count(".") == 1 for scene in scenes("train", 300, seed=0))


def test_narrow_captions_tell_one_or_two_true_facts_and_never_the_sign() -> None:
    rng = Random(0)
    told, things, sizes, places = [], 0, 0, 0
    for scene in scenes("train", 1500, seed=0, crowded=0.5):
        caption = narrow_caption(scene, rng)
        facts = parse(caption)
        assert "sign" not in caption and '"' not in caption
        assert grade(scene, caption).precision() == 1.0
        assert len(facts.things) + len(facts.backgrounds) + len(facts.counts) == caption.count(".")
        told.append(caption.count("."))
        things += len(facts.things)
        sizes += sum(thing.size is not None for thing in facts.things)
        places += sum(thing.place is not None for thing in facts.things)
    assert set(told) == {1, 2} and 0.2 < told.count(2) / len(told) < 0.3
    assert 0.3 < sizes / things < 0.4 and 0.55 < places / things < 0.65


def test_all_that_a_crowded_scene_has_can_be_told() -> None:
    rng = Random(0)
    for scene in scenes("train", 100, seed=0, crowded=1.0):
        caption = dense_caption(scene, rng)
        whole = grade(scene, caption)
        assert whole.precision() == 1.0 and whole.recall("place") == 1.0
    assert any(NUMBERS[9] in narrow_caption(scene, rng).lower() for scene in scenes("train", 300, 0, 1.0))


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
