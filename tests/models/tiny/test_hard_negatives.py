"""True texts are true, their false twins are not, and the planted sentence is where it is said to be."""

from __future__ import annotations

from random import Random

from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.train.texts.hard_negatives import (
    addition,
    changed,
    holds,
    plant_addition,
    plant_change,
    sentence_pair,
    true_and_false,
)
from capipe.models.tiny.world.grade import grade
from capipe.models.tiny.world.scenes import scenes

SCENES = list(scenes("train", 300, seed=3))


def test_exactly_one_attribute_changes_and_things_keep_their_order() -> None:
    rng = Random(0)
    for scene in SCENES:
        other = changed(scene, rng)
        fields = [(scene.background, other.background), (scene.sign, other.sign)]
        fields += [
            (getattr(a, name), getattr(b, name))
            for a, b in zip(scene.things, other.things, strict=True)
            for name in ("shape", "color", "size", "place")
        ]
        assert sum(a != b for a, b in fields) == 1


def test_planted_changes_are_in_the_sentence_named_and_nowhere_else() -> None:
    rng = Random(1)
    for scene in SCENES:
        planted = plant_change(scene, rng)
        before, after = split_sentences(planted.original), split_sentences(planted.text)
        assert [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == [planted.sentence]
        assert holds(scene, planted.original) and not holds(scene, planted.text)


def test_planted_additions_are_things_that_are_not_there() -> None:
    rng = Random(2)
    for scene in SCENES:
        planted = plant_addition(scene, rng)
        sentences = split_sentences(planted.text)
        added = sentences.pop(planted.sentence)
        assert " ".join(sentences) == planted.original
        assert not holds(scene, added)
        assert grade(scene, planted.text).hallucinated == 1


def test_sentences_and_captions_differ_from_their_twins_and_are_true() -> None:
    rng = Random(3)
    for scene in SCENES:
        text, false = true_and_false(scene, rng)
        assert text and false and text != false
        true, untrue = sentence_pair(scene, rng)
        assert true != untrue and len(split_sentences(true)) == len(split_sentences(untrue)) == 1
        assert holds(scene, true) and not holds(scene, addition(scene, rng))
