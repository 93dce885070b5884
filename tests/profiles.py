"""ICC profiles (version 2) made by hand, and pictures as they are stored under one: Pillow itself makes only sRGB's."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]
Levels = npt.NDArray[np.uint8]

D50 = (0.9642, 1.0, 0.8249)
# Columns: XYZ of red, green and blue, adapted to D50.
SRGB = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
PROPHOTO = np.array([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0, 0.0, 0.8249]])
PERMUTED = SRGB[:, [1, 2, 0]]  # what is stored as red is shown as green, green as blue, blue as red
SRGB_CURVE = -1.0  # for a gamma


def rgb_profile(primaries: Floats = PROPHOTO, gamma: float = 1.8, padding: int = 0) -> bytes:
    """A monitor's profile. ``padding``: bytes of a private tag, which do not compress."""
    tags = {name: _xyz(*column) for name, column in zip(("rXYZ", "gXYZ", "bXYZ"), primaries.T, strict=True)}
    tags |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), _curve(gamma))
    if padding:
        tags["padd"] = b"data" + bytes(4) + np.random.default_rng(0).bytes(padding)
    return _profile("RGB ", "XYZ ", tags)


def gray_profile(gamma: float = 1.0) -> bytes:
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Of a press whose cyan ink is yellow, its magenta cyan and its yellow magenta."""
    tables = bytes(range(256))
    corners = b"".join(_lab_bytes(_ink_rgb(np.array(inks))) for inks in itertools.product((0.0, 1.0), repeat=4))
    identity = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(each << 16 for each in identity))
    return _profile("CMYK", "Lab ", {"A2B0": lut + 4 * tables + corners + 3 * tables}, device="prtr")


def stored(levels: Levels, primaries: Floats = PROPHOTO, gamma: float = 1.8) -> Levels:
    """The levels that an sRGB picture (without colors outside the other's gamut) has under :func:`rgb_profile`."""
    linear = _to_linear(levels / 255) @ (np.linalg.inv(primaries) @ SRGB).T
    linear = np.clip(linear, 0, 1)
    curved = from_linear(linear) if gamma == SRGB_CURVE else linear ** (1 / gamma)
    return np.round(curved * 255).astype(np.uint8)


def muted(levels: Levels) -> Levels:
    """Pale versions of colors, inside of every gamut."""
    return (levels // 2 + 64).astype(np.uint8)


def _ink_rgb(inks: Floats) -> Floats:
    """sRGB from 0 to 1 under inks from 0 to 1."""
    yellow, cyan, magenta, black = inks
    return (1 - np.array([cyan, magenta, yellow])) * (1 - black)


def _lab_bytes(rgb: Floats) -> bytes:
    relative = (SRGB @ _to_linear(rgb)) / D50
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    lab = (116 * y - 16) * 2.55, 500 * (x - y) + 128, 200 * (y - z) + 128
    return bytes(int(np.clip(round(each), 0, 255)) for each in lab)


def _to_linear(levels: Floats) -> Floats:
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def from_linear(linear: Floats) -> Floats:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(each * 65536) for each in (x, y, z)))


def _curve(gamma: float) -> bytes:
    if gamma == SRGB_CURVE:
        points = np.round(_to_linear(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
        return b"curv" + bytes(4) + struct.pack(">I", 1024) + points.tobytes()
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _profile(space: str, connection: str, tags: dict[str, bytes], device: str = "mntr") -> bytes:
    name = b"made by hand\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(8 + 3 + 67)
    tags = {"desc": description, "cprt": b"text" + bytes(4) + b"none\0", "wtpt": _xyz(*D50)} | tags
    table, body, start = [struct.pack(">I", len(tags))], b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table.append(tag.encode() + struct.pack(">II", start + len(body), len(data)))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"", 0x02100000, *map(str.encode, (device, space, connection))
    )
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _xyz(*D50)[8:]
    return header.ljust(128, b"\0") + b"".join(table) + body


def patches(*colors: tuple[int, int, int], side: int = 32) -> Image.Image:
    """Squares of these colors in a row."""
    return Image.fromarray(np.array([colors], np.uint8).repeat(side, axis=0).repeat(side, axis=1))
