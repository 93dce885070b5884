"""JPEG XL: the size, from the first bits of the codestream (ISO/IEC 18181-1, annex D; 18181-2 for the container)."""

from __future__ import annotations

from .boxes import top_boxes
from .structure import Structure, corrupt

_MARK = b"\xff\x0a"
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width to height


def read_jxl(data: bytes) -> Structure:
    """Raises UnusableImage, IndexError. An animation counts as one frame: its first is what is decoded."""
    if data[:2] == _MARK:
        return Structure(*_size(data[:32]))
    found, complete = top_boxes(data)
    for box in found:
        start = box.start + (4 if box.kind == b"jxlp" else 0)  # parts are numbered
        if box.kind in (b"jxlc", b"jxlp") and data[start : start + 2] == _MARK:
            return Structure(*_size(data[start : start + 32]), complete=complete)
    if complete:
        raise corrupt("a JPEG XL file without an image")
    return Structure(1, 1, complete=False)


class _Bits:
    """Bits of a codestream: of each byte, the lowest first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        """The next bits as a number. Raises IndexError at the end."""
        if count > self._left:
            raise IndexError("the codestream ends")
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return value


def _size(codestream: bytes) -> tuple[int, int]:
    bits = _Bits(codestream[2:])
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    if not ratio:
        return _side(bits, small), height
    across, down = _RATIOS[ratio - 1]
    return height * across // down, height


def _side(bits: _Bits, small: int) -> int:
    if small:
        return 8 * (bits.take(5) + 1)
    return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])
