"""Yes-or-no questions are true to their scenes, balanced, and hard where they are to be."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from capipe.models.tiny.train.texts.presence import PRESENCE_KINDS, sample_presence
from capipe.models.tiny.world.scenes import SHAPES, Scene, Sign, Thing, sample_of

from .presence_answers import A_THING, answer

SCENES = [sample_of("train", Random(f"presence:{number}"), sign_share=0.5) for number in range(300)]


@pytest.mark.parametrize("kind", PRESENCE_KINDS)
def test_answers_are_those_of_the_scene_and_half_are_yes(kind: str) -> None:
    rng = Random(kind)
    yes = 0
    for scene in SCENES:
        asked = sample_presence(scene, rng, kind)
        assert asked.kind == kind and answer(asked.text, scene) is asked.holds, (asked, scene)
        yes += asked.holds
    low = 0.15 if kind in ("sign", "word") else 0.4  # half of the scenes have no sign
    assert low < yes / len(SCENES) < 0.6


def test_all_kinds_are_asked() -> None:
    rng = Random(1)
    kinds = Counter(sample_presence(SCENES[0], rng).kind for _ in range(900))
    assert set(kinds) == set(PRESENCE_KINDS) and min(kinds.values()) > 60


def test_what_is_absent_is_close_to_what_is_there() -> None:
    """Of the things that are not there, most have each of their attributes somewhere in the image."""
    rng, near, total = Random(2), 0, 0
    for scene in SCENES:
        asked = sample_presence(scene, rng, "thing")
        match = A_THING.fullmatch(asked.text)
        assert match is not None
        if asked.holds or match["color"] is None or match["noun"] in ("shape", "object"):
            continue
        total += 1
        colors, shapes = {thing.color for thing in scene.things}, {thing.shape for thing in scene.things}
        near += match["color"] in colors and match["noun"] in shapes
    assert total > 50 and near / total > 0.4


def test_a_scene_that_lacks_no_shape_is_asked_for_one_that_is_there() -> None:
    places = ("top left", "top center", "top right", "middle left", "center")
    things = tuple(Thing(place, shape, "red", "large") for place, shape in zip(places, SHAPES, strict=True))
    full = Scene("white", things, Sign("STOP", "bottom right"))
    assert all(sample_presence(full, Random(seed), "shape").holds for seed in range(30))
