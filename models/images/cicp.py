"""ICC profiles for colors that a file gives as code points alone (Rec. ITU-T H.273), as AVIF and HEIF files do.

So one door converts all colors (:mod:`.icc`). A profile has the primaries, adapted to D50 by Bradford's matrix, and a
parametric curve (ICC.1:2022, 10.18).
"""

from __future__ import annotations

import functools
import struct

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]

_D50 = (0.9642, 1.0, 0.8249)
_D65, _C, _DCI, _EQUAL = (0.3127, 0.3290), (0.310, 0.316), (0.314, 0.351), (1 / 3, 1 / 3)
# Chromaticities of red, green, blue and white by H.273's table 2, but for 1, sRGB's, and 2, unspecified.
_PRIMARIES = {
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), _C),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), _D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65),
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), _C),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    10: ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), _EQUAL),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _DCI),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), _D65),
}
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
# Parameters of curves by table 3: g, and where it has a linear part a, b, c, d of ICC's function type 3. All others are
# taken as sRGB's (13): 2 is unspecified; 1, 6, 11, 12, 14 and 15 are curves of cameras for television, whose pictures a
# screen shows as it shows sRGB's.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_CURVES: dict[int, tuple[float, ...]] = {
    4: (2.2,),
    5: (2.8,),
    7: (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4, 0.0913),
    8: (1.0,),
    17: (2.6,),
}


@functools.cache
def profile_of(primaries: int, transfer: int) -> bytes | None:
    """Profile of code points; None for those of sRGB, and for reserved ones, which say nothing."""
    curve = _CURVES.get(transfer, _SRGB_CURVE)
    if primaries not in _PRIMARIES and curve == _SRGB_CURVE:
        return None
    return _profile(_columns(*_PRIMARIES.get(primaries, _SRGB)), curve)


def _columns(*points: tuple[float, float]) -> _Floats:
    """``(3, 3)``: XYZ of red, green and blue as columns, relative to D50."""
    *colors, white = (np.array([x, y, 1 - x - y]) for x, y in points)
    white = white / white[1]
    matrix: _Floats = np.column_stack(colors)
    matrix = matrix * np.linalg.solve(matrix, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = (bradford @ np.array(_D50)) / (bradford @ white)
    adapted: _Floats = np.linalg.inv(bradford) @ np.diag(gains) @ bradford @ matrix
    return adapted


def _profile(columns: _Floats, curve: tuple[float, ...]) -> bytes:
    text = "code points".encode("utf-16-be")
    words = b"mluc" + struct.pack(">4xII4sII", 1, 12, b"enUS", len(text), 28) + text
    tags = {b"desc": words, b"cprt": words, b"wtpt": _xyz(*_D50)}
    tags |= {name: _xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T, strict=True)}
    kind = 0 if len(curve) == 1 else 3
    steps = b"para" + struct.pack(f">4xHxx{len(curve)}i", kind, *map(_fixed, curve))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), steps)
    table, body, start = [struct.pack(">I", len(tags))], b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table.append(name + struct.pack(">II", start + len(body), len(data)))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x04400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _xyz(*_D50)[8:]
    return head.ljust(128, b"\0") + b"".join(table) + body


def _fixed(number: float) -> int:
    return round(number * 65536)


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + struct.pack(">4x3i", *map(_fixed, (x, y, z)))
