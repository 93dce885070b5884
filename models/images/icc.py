"""Embedded ICC profiles: conversion of pixels to sRGB, which models, hashes and scorers assume.

Relative colorimetric with black point compensation: by that intent every usual sRGB profile is the identity (ICC's own
v4 profile is not by the perceptual one), and a matrix profile has no other.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..lru_cache import LRUCache

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsProfile, ImageCmsTransform

MAX_PROFILE_BYTES = 16 << 20  # a JPEG cannot hold more: 255 segments of 64 kB
SRGB_TOLERANCE = 2  # levels of 255; sRGB's many profiles are within 1 of each other, Rec. 709's is 16 away
_KEPT_CONVERSIONS = 64  # half a megabyte each for CMYK, some kilobytes for RGB
_LEAST_CONTRAST = 64  # least levels between black and white of a valid profile

# By the profile's color space: the pixel mode it applies to, and the image modes that may carry it. Gray images may
# have an RGB profile: their three channels are equal.
_GRAY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_SPACES = {
    "RGB ": ("RGB", ("RGB", "RGBA", "RGBX", "YCbCr", "P", "PA", *_GRAY)),
    "GRAY": ("L", _GRAY),
    "CMYK": ("CMYK", ("CMYK",)),
}
_DEVICES = ("scnr", "mntr", "prtr", "spac")  # the other classes do not describe an image's colors


@dataclass(frozen=True, slots=True)
class Conversion:
    """From pixels in ``mode`` under one profile to sRGB. Thread-safe."""

    mode: str
    to_rgb: Callable[[Image.Image], Image.Image]

    def apply(self, image: Image.Image) -> Image.Image:
        """The RGB of ``image``, which has eight bits per channel and no transparency."""
        converted = self.to_rgb(image if image.mode == self.mode else image.convert(self.mode))
        converted.info = {}
        return converted


def srgb_conversion(image: Image.Image) -> Conversion | None:
    """The conversion that ``image`` (not necessarily loaded) needs to become sRGB.

    None where it needs none: without a profile, with sRGB's, with one that is broken or for another kind of image.
    Decided once per profile and process.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    key = hashlib.blake2b(profile, digest_size=16).digest(), image.mode
    with _lock:
        if key not in _conversions:
            _conversions.put(key, _conversion(profile, image.mode))
        return _conversions.get(key)


def _conversion(profile: bytes, mode: str) -> Conversion | None:
    from PIL import ImageCms  # only images with a profile need it

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        pixels, pictures = _SPACES.get(source.profile.xcolor_space, ("", ()))
        if mode not in pictures or source.profile.device_class not in _DEVICES:
            return None
        transform = _transform(source, pixels)
        return _unless_identity(Conversion(pixels, _by_table(transform) if pixels == "L" else transform.apply))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _transform(source: ImageCmsProfile, mode: str) -> ImageCmsTransform:
    from PIL import ImageCms

    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":
        flags |= ImageCms.Flags.NOOPTIMIZE  # the optimised path reads every eighth level and is 10 off between
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(source, target, mode, "RGB", intent, flags=flags)


def _by_table(transform: ImageCmsTransform) -> Callable[[Image.Image], Image.Image]:
    """The same for gray images: 256 levels are looked up faster than they are computed."""
    levels = _levels(transform.apply(_ramp()))[:, 1].tolist()
    return lambda image: image.point(levels).convert("RGB")


def _unless_identity(conversion: Conversion) -> Conversion | None:
    """None for a profile of sRGB, and for one with too little contrast to be valid."""
    if conversion.mode == "CMYK":
        ends = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 255, 255, 255]]], np.uint8), "CMYK")
        white, black = _levels(conversion.apply(ends))
        return conversion if (white - black).min() >= _LEAST_CONTRAST else None
    samples = _ramp() if conversion.mode == "L" else _cube()
    before, after = _levels(samples), _levels(conversion.apply(samples))
    if np.abs(after - before).max() <= SRGB_TOLERANCE:
        return None
    return conversion if (after[-1] - after[0]).min() >= _LEAST_CONTRAST else None


def _ramp() -> Image.Image:
    """All gray levels, black first."""
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _cube() -> Image.Image:
    """The grays and 17 levels of each channel against each other's, black first, white last."""
    level = np.linspace(0, 255, 17).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    gray = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    return Image.fromarray(np.concatenate([gray, cube])[None])


def _levels(image: Image.Image) -> npt.NDArray[np.int64]:
    """``(n, 3)`` signed levels of an image of one row."""
    levels: npt.NDArray[np.int64] = np.asarray(image.convert("RGB"))[0].astype(np.int64)
    return levels


_conversions: LRUCache[tuple[bytes, str], Conversion | None] = LRUCache(_KEPT_CONVERSIONS)
_lock = threading.Lock()
