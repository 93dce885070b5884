from __future__ import annotations

import hashlib
from itertools import islice
from random import Random

import pytest

from capipe.models.tiny.world.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    Scene,
    Sign,
    Thing,
    sample_scene,
    scenes,
    split_of,
)


def test_splits_are_disjoint_and_repeatable() -> None:
    train = {scene.signature for scene in scenes("train", 2000, seed=0)}
    heldout = {scene.signature for scene in scenes("heldout", 2000, seed=0)}
    assert not train & heldout
    assert all(split_of(scene) == "heldout" for scene in scenes("heldout", 50, seed=3))
    assert list(scenes("heldout", 20, seed=3)) == list(islice(scenes("heldout", 50, seed=3), 20))
    assert list(scenes("heldout", 20, seed=3)) != list(scenes("heldout", 20, seed=4))


def test_one_scene_in_ten_is_held_out() -> None:
    rng = Random(0)
    share = sum(split_of(sample_scene(rng)) == "heldout" for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_sampled_scenes_cover_the_world() -> None:
    sampled = list(scenes("train", 2000, seed=1))
    assert {len(scene.things) for scene in sampled} == {1, 2, 3, 4, 5}
    assert {thing.place for scene in sampled for thing in scene.things} == set(PLACES)
    assert 0.25 < sum(scene.sign is not None for scene in sampled) / len(sampled) < 0.35


def test_crowded_scenes_are_drawn_on_request_alone() -> None:
    crowded = list(scenes("heldout", 400, seed=1, crowded=1.0))
    assert {len(scene.things) for scene in crowded} == {6, 7, 8, 9}
    assert all(split_of(scene) == "heldout" for scene in crowded)
    assert {scene.sign is not None for scene in crowded if len(scene.things) < 9} == {True, False}
    assert all(scene.sign is None for scene in crowded if len(scene.things) == 9)
    mixed = [len(scene.things) for scene in scenes("train", 1000, seed=1, crowded=0.3)]
    assert 0.25 < sum(count > 5 for count in mixed) / 1000 < 0.35


def test_scenes_of_a_seed_stay_what_they_were() -> None:
    signatures = "".join(scene.signature for scene in scenes("train", 50, seed=31))
    assert hashlib.sha256(signatures.encode()).hexdigest()[:16] == "aac9918780f66876"


def test_no_background_is_named_like_a_color() -> None:
    assert not set(BACKGROUNDS) & set(COLORS)


def test_scenes_survive_json_and_keep_their_signature() -> None:
    for scene in scenes("train", 200, seed=2):
        again = Scene.from_dict(scene.to_dict())
        assert again == scene
        assert again.signature == scene.signature


def test_signature_is_stable_across_machines_and_versions() -> None:
    scene = Scene("white", (Thing("center", "star", "red", "large"),), Sign("STOP", "top left"))
    assert scene.signature == "5b1efbb10c1e17f2bcc70de18a11052e"


@pytest.mark.parametrize(
    "data",
    [
        {"background": "green", "things": []},
        {"background": "white", "things": [{"shape": "blob", "color": "red", "size": "small", "place": "center"}]},
        {
            "background": "white",
            "things": [{"shape": "star", "color": "red", "size": "small", "place": "center"}],
            "sign": {"text": "STOP", "place": "center"},
        },
        {"background": "white", "things": [], "sign": {"text": "HOUSE", "place": "center"}},
    ],
)
def test_impossible_scenes_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"unknown|distinct"):
        Scene.from_dict(data)


def test_things_must_be_in_reading_order() -> None:
    late, early = Thing("center", "star", "red", "large"), Thing("top left", "star", "red", "large")
    with pytest.raises(ValueError, match="reading order"):
        Scene("white", (late, early))
