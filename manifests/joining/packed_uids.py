"""Uids as arrays of 16 bytes each, in place of texts of 32 hexadecimal digits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

DIGITS = 32  # hex digits of a uid
HINT = "a uid is the first 32 hex digits of the sha256 of an image's bytes"
_INVALID = 255

Packed = npt.NDArray[np.bytes_]  # of 16 bytes each
Mask = npt.NDArray[np.bool_]


def _digit_values() -> npt.NDArray[np.uint8]:
    values = np.full(256, _INVALID, np.uint8)
    for digits in (b"0123456789abcdef", b"0123456789ABCDEF"):
        values[np.frombuffer(digits, np.uint8)] = np.arange(16)
    return values


_VALUES = _digit_values()


def pack(digits: npt.NDArray[np.uint8]) -> tuple[Packed, Mask]:
    """(n, 32) ASCII hex digits as n values of 16 bytes, and which of them are valid."""
    values = _VALUES[digits]
    valid: Mask = (values != _INVALID).all(axis=1)
    halves = (values[:, 0::2] << 4) | (values[:, 1::2] & 15)
    return np.ascontiguousarray(halves).view("S16").reshape(-1), valid


def packed_of(column: pa.Array) -> tuple[Packed, Mask]:
    """(n,) texts, null allowed, as n values of 16 bytes, and which of them are uids; the others are zeros."""
    usable = np.array(pc.fill_null(pc.equal(pc.binary_length(column), DIGITS), False), dtype=bool)
    digits, whole = pack(digits_of(column.filter(pa.array(usable))))
    packed, valid = np.zeros(len(column), "S16"), np.zeros(len(column), bool)
    packed[usable], valid[usable] = digits, whole
    return packed, valid


def digits_of(column: pa.Array) -> npt.NDArray[np.uint8]:
    """(n, 32) characters of an array of texts without null, all of 32 bytes."""
    text = column.cast(pa.string())
    if not len(text):
        return np.empty((0, DIGITS), np.uint8)
    _, offsets, values = text.buffers()
    bounds = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    return np.frombuffer(values, np.uint8)[bounds[0] : bounds[-1]].reshape(-1, DIGITS)
