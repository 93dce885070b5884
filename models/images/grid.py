"""Image sizes that a vision model takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """Sizes that a model sees: multiples of ``factor`` pixels, within an area of min to max pixels."""

    factor: int
    min_pixels: int
    max_pixels: int
