"""The sizes of images that a vision model takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """The sizes a model really looks at: multiples of ``factor`` pixels, within an area of min to max pixels."""

    factor: int
    min_pixels: int
    max_pixels: int
