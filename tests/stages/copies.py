"""Copies of a picture as they are found on the web, and pictures that only nearly are copies."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from random import Random

from PIL import Image, ImageEnhance

from capipe.models.tiny.world.corpus import encode
from capipe.models.tiny.world.render import render
from capipe.models.tiny.world.scenes import COLORS, SHAPES, WORDS, Scene, scenes

from ..conftest import photo

COPIES = ("exact", "jpeg q60", "resized to 70 %", "cropped 4 %", "brighter by 15 %")
NEAR = ("one thing recoloured", "one thing reshaped", "one thing removed", "another word on the sign")


def copies(data: bytes) -> dict[str, bytes]:
    """A copy of each kind of :data:`COPIES`."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    dx, dy = round(0.02 * width), round(0.02 * height)
    small = image.resize((round(0.7 * width), round(0.7 * height)), Image.Resampling.BICUBIC)
    made = (
        data,
        jpeg(image, 60),
        jpeg(small),
        jpeg(image.crop((dx, dy, width - dx, height - dy))),
        jpeg(ImageEnhance.Brightness(image).enhance(1.15)),
    )
    return dict(zip(COPIES, made, strict=True))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def originals(scenes_: int, photos: int, size: int, seed: int) -> Iterator[tuple[bytes, dict[str, bytes]]]:
    """Pictures, each with others that differ from it in one thing; smooth ones have none.

    No scene comes twice: two drawings of one scene may differ by less than a copy does.
    """
    for number, scene in enumerate(list(dict.fromkeys(scenes("heldout", 2 * scenes_, seed)))[:scenes_]):
        others = _near(scene, Random(f"{seed}:{number}"))
        yield _drawn(scene, number, size), {kind: _drawn(other, number, size) for kind, other in others.items()}
    for number in range(photos):
        yield photo(1000 * seed + number, (320, 240)), {}


def _drawn(scene: Scene, number: int, size: int) -> bytes:
    """With the same draws for all that is alike in two scenes."""
    return encode(render(scene, Random(number), size), "jpg")


def _near(scene: Scene, rng: Random) -> dict[str, Scene]:
    """The scene with one thing changed, by kind; a kind that it has nothing for is left out."""
    things = list(scene.things)
    at = rng.randrange(len(things))
    color = rng.choice([c for c in COLORS if c != things[at].color])
    shape = rng.choice([s for s in SHAPES if s != things[at].shape])

    def with_thing(**change: str) -> Scene:
        changed = dataclasses.replace(things[at], **change)
        return dataclasses.replace(scene, things=(*things[:at], changed, *things[at + 1 :]))

    found = {NEAR[0]: with_thing(color=color), NEAR[1]: with_thing(shape=shape)}
    if len(things) > 1:
        found[NEAR[2]] = dataclasses.replace(scene, things=(*things[:at], *things[at + 1 :]))
    if scene.sign is not None:
        word = rng.choice([w for w in WORDS if w != scene.sign.text])
        found[NEAR[3]] = dataclasses.replace(scene, sign=dataclasses.replace(scene.sign, text=word))
    return found
