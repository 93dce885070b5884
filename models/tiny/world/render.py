"""Scene rendering: anti-aliased, with jittered positions, sizes, angles and colours, deterministic given the rng."""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from .scenes import PLACES, Scene, Sign, Thing

Point = tuple[float, float]
RGB = tuple[int, int, int]

SUPERSAMPLE = 3
UNIT = 112.0  # all lengths below are in pixels of an image this wide; other sizes scale them
RADII = {"small": (7.2, 8.8), "large": (14.0, 16.0)}
SHIFT = 2.0
ANGLE = math.radians(8)
TINT = 10
PLATE: Point = (35.0, 18.0)
PLATE_COLOR: RGB = (250, 244, 214)
INK: RGB = (20, 20, 30)
COLORS: dict[str, RGB] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 10),
    "yellow": (243, 225, 30),
    "green": (30, 160, 45),
    "cyan": (30, 205, 220),
    "blue": (35, 65, 220),
    "purple": (135, 35, 175),
    "pink": (250, 135, 195),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (243, 243, 243),
    "black": (14, 14, 14),
    "gray": (128, 128, 128),
    "brown": (105, 68, 35),
}


def _star(points: int, inner: float) -> list[Point]:
    """A star's outline in the unit circle, first point up."""
    turns = [(math.pi * k / points, 1.0 if k % 2 == 0 else inner) for k in range(2 * points)]
    return [(r * math.sin(turn), -r * math.cos(turn)) for turn, r in turns]


_ARM = 0.32
OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(5, 0.42),
    "cross": [
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def render(scene: Scene, rng: Random, size: int = 112) -> Image.Image:
    """Render the scene as an RGB image of ``size`` x ``size`` pixels; the same rng state gives the same pixels."""
    scale = size * SUPERSAMPLE / UNIT
    canvas = Image.new("RGB", (size * SUPERSAMPLE,) * 2, _tinted(BACKGROUNDS[scene.background], rng))
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, rng, scale)
    if scene.sign is not None:
        _paste_sign(canvas, scene.sign, rng, scale)
    return canvas.reduce(SUPERSAMPLE)


def _tinted(color: RGB, rng: Random) -> RGB:
    red, green, blue = (min(255, max(0, level + rng.randint(-TINT, TINT))) for level in color)
    return red, green, blue


def _center(place: str, rng: Random, shift: float) -> Point:
    """The jittered middle of a cell, in ``UNIT`` pixels."""
    row, column = divmod(PLACES.index(place), 3)
    x, y = (UNIT * (2 * index + 1) / 6 + rng.uniform(-shift, shift) for index in (column, row))
    return x, y


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: Random, scale: float) -> None:
    x, y = _center(thing.place, rng, SHIFT)
    radius = rng.uniform(*RADII[thing.size])
    turn = rng.uniform(-ANGLE, ANGLE)
    color = _tinted(COLORS[thing.color], rng)
    if thing.shape == "circle":
        box = [(x - radius) * scale, (y - radius) * scale, (x + radius) * scale, (y + radius) * scale]
        draw.ellipse(box, fill=color)
        return
    sin, cos = math.sin(turn) * radius, math.cos(turn) * radius
    outline = [((x + u * cos - v * sin) * scale, (y + u * sin + v * cos) * scale) for u, v in OUTLINES[thing.shape]]
    draw.polygon(outline, fill=color)


def _paste_sign(canvas: Image.Image, sign: Sign, rng: Random, scale: float) -> None:
    plate = _plate(sign.text, scale).rotate(rng.uniform(-3, 3), Image.Resampling.BILINEAR, expand=True)
    x, y = _center(sign.place, rng, 1.0)
    corner = (round(x * scale - plate.width / 2), round(y * scale - plate.height / 2))
    canvas.paste(plate, corner, plate)


@lru_cache(maxsize=64)
def _plate(text: str, scale: float) -> Image.Image:
    """The sign's plate as RGBA, its word as large as fits. Cached: callers must not draw on it."""
    width, height = (round(side * scale) for side in PLATE)
    plate = Image.new("RGBA", (width, height), (*PLATE_COLOR, 255))
    draw = ImageDraw.Draw(plate)
    edge = max(1, round(scale))
    draw.rectangle([0, 0, width - 1, height - 1], outline=INK, width=edge)
    font, stroke = _fitting_font(text, width - 4 * edge, height - 5 * edge)
    draw.text((width / 2, height / 2), text, fill=INK, font=font, anchor="mm", stroke_width=stroke)
    return plate


def _fitting_font(text: str, width: float, height: float) -> tuple[ImageFont.FreeTypeFont, float]:
    """Pillow's default font at the largest size that fits the word into the box, and the stroke width for bold."""
    probe = ImageFont.load_default(100)
    if not isinstance(probe, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, which the signs' letters need")
    left, top, right, bottom = probe.getbbox(text, stroke_width=4)
    points = 100 * min(width / (right - left), height / (bottom - top))
    return probe.font_variant(size=points), points * 0.04
