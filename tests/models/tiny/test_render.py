from __future__ import annotations

from random import Random

import pytest

from capipe.models.tiny.world.render import BACKGROUNDS, COLORS, render
from capipe.models.tiny.world.scenes import PLACES, Scene, Sign, Thing, scenes


def test_same_rng_same_pixels_other_rng_jitters() -> None:
    scene = next(scenes("train", 1, seed=0))
    picture = render(scene, Random(1))
    assert picture.mode == "RGB"
    assert picture.tobytes() == render(scene, Random(1)).tobytes()
    assert picture.tobytes() != render(scene, Random(2)).tobytes()


@pytest.mark.parametrize("size", [56, 112, 140, 224, 448])
def test_any_size_shows_things_where_they_are(size: int) -> None:
    scene = Scene("black", tuple(Thing(place, "square", "red", "large") for place in PLACES[::2]))
    picture = render(scene, Random(0), size)
    assert picture.size == (size, size)
    for index, place in enumerate(PLACES):
        row, column = divmod(index, 3)
        pixel = picture.getpixel((size * (2 * column + 1) // 6, size * (2 * row + 1) // 6))
        wanted = COLORS["red"] if place in PLACES[::2] else BACKGROUNDS["black"]
        assert isinstance(pixel, tuple)
        assert all(abs(got - want) <= 12 for got, want in zip(pixel, wanted, strict=True)), place


def test_edges_are_smooth() -> None:
    scene = Scene("black", (Thing("center", "circle", "yellow", "large"),))
    colors = render(scene, Random(0)).getcolors(10_000)
    assert colors is not None
    assert len(colors) > 5


@pytest.mark.parametrize("word", ["STOP", "BUS"])
def test_signs_have_dark_letters_on_a_light_plate(word: str) -> None:
    picture = render(Scene("brown", (), Sign(word, "center")), Random(0)).convert("L").crop((42, 49, 70, 63))
    low, high = picture.getextrema()
    assert isinstance(low, int) and isinstance(high, int)
    assert low < 60 and high > 220
