"""Lists of withdrawn images: a text file with one uid per line, or a column of a Parquet file, as a sorted array.

A uid takes 16 bytes in memory, however it is written: a list of a million needs no object per line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadInput
from ..files.storage import open_parquet
from ..files.stores import filesystem
from ..files.tar import printable
from ..joining.packed_uids import DIGITS, HINT, Mask, Packed, digits_of, pack, packed_of

COLUMN = "uid"
_SUFFIX = ".parquet"
_BLOCK = 4 << 20  # bytes read at a time
_LONGEST = 4096  # bytes of a line
_WHITESPACE = np.frombuffer(b" \t\r\v\f", np.uint8)
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte-order mark


@dataclass(frozen=True, eq=False)
class UidSet:
    """Distinct uids. ``packed``: (n,) of 16 bytes each, sorted; ``source``: where they are from, for messages.

    ``entries``: number of uids in the source, repeated ones included.
    """

    packed: Packed
    source: str = ""
    entries: int = 0

    @classmethod
    def of(cls, uids: Iterable[str], source: str = "") -> UidSet:
        """Set of uids given as text. Raises ValueError for one that is none."""
        data = b"".join(bytes.fromhex(uid) for uid in uids)
        packed = np.frombuffer(data, "S16")
        return cls(np.unique(packed), source, len(packed))

    def __len__(self) -> int:
        return len(self.packed)

    def __contains__(self, uid: object) -> bool:
        if not isinstance(uid, str) or len(uid) != DIGITS or not len(self):
            return False
        try:
            one = np.frombuffer(bytes.fromhex(uid), "S16")
        except ValueError:
            return False
        return bool(self._places(one)[0] >= 0)

    @cached_property
    def sha256(self) -> str:
        """Digest of the set: equal for lists of the same uids in any order, case and number of repetitions."""
        return hashlib.sha256(self.packed.tobytes()).hexdigest()

    def mask(self, uids: pa.Array | pa.ChunkedArray) -> Mask:
        """(n,) True for each of ``uids`` (text, null allowed) in the set."""
        return self.places(uids) >= 0

    def places(self, uids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """(n,) index in :attr:`packed` of each of ``uids`` (text, null allowed), -1 if it is not in the set."""
        packed, valid = packed_of(uids.combine_chunks() if isinstance(uids, pa.ChunkedArray) else uids)
        return np.where(valid, self._places(packed), -1)

    def holds(self, packed: Packed) -> Mask:
        """(n,) True for each of ``packed`` (16 bytes each) in the set."""
        return self._places(packed) >= 0

    def missing_in(self, other: UidSet) -> UidSet:
        """The uids that ``other`` lacks."""
        return UidSet(self.packed[~other.holds(self.packed)], self.source)

    def shown(self, count: int = 1) -> list[str]:
        """The first uids as text."""
        return [uid.ljust(DIGITS // 2, b"\0").hex() for uid in self.packed[:count].tolist()]

    def _places(self, packed: Packed) -> npt.NDArray[np.int64]:
        if not len(self):
            return np.full(len(packed), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.packed, packed), len(self) - 1)
        return np.where(self.packed[places] == packed, places, -1)


EMPTY = UidSet(np.empty(0, "S16"))


# --- reading lists ----------------------------------------------------------------------------------------------------


def read_uids(given: str) -> UidSet:
    """The uids of ``FILE``, one per line, of ``FILE.parquet`` (column ``uid``) or of ``FILE.parquet:COLUMN``.

    Digits may be in either case: hexadecimal numbers have no other meaning. Blank lines and nulls are skipped. Paths
    and fsspec URLs. Raises BadInput, naming the file and the line, if something else is in it.
    """
    file, column = _parts(given)
    try:
        found = list(_of_parquet(file, column) if column is not None else _of_text(file))
    except FileNotFoundError:
        raise BadInput(f"{file}: no such file; --drop takes a list of uids, one per line, or a Parquet file") from None
    except (OSError, pa.ArrowException, ValueError, ImportError) as error:
        raise BadInput(f"{file}: cannot be read as a list of uids ({error}); {HINT}") from None
    packed = np.concatenate([EMPTY.packed, *found])
    return UidSet(np.unique(packed), given, len(packed))


def list_file(given: str) -> str:
    """The file of a list, without the name of a column."""
    return _parts(given)[0]


def _parts(given: str) -> tuple[str, str | None]:
    """File and column of a list; no column for text."""
    if given.endswith(_SUFFIX):
        return given, COLUMN
    file, colon, column = given.rpartition(":")
    return (file, column) if colon and file.endswith(_SUFFIX) and column else (given, None)


def _of_text(url: str) -> Iterator[Packed]:
    fs, path = filesystem(url)
    with fs.open(path) as file:
        for chunk, number in _chunks(url, file):
            yield _of_lines(url, chunk, number)


def _chunks(url: str, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Runs of whole lines, each with the number of its first line."""
    left, number = b"", 1
    while block := file.read(_BLOCK):
        data = (left + block).removeprefix(_MARK) if number == 1 else left + block
        end = data.rfind(b"\n") + 1
        left = data[end:]
        if end:
            yield data[:end], number
            number += data[:end].count(b"\n")
        if len(left) > _LONGEST:
            _refuse(url, f"line {number}", left[:_LONGEST])
    if left:
        yield left.removeprefix(_MARK) + b"\n", number


def _of_lines(url: str, chunk: bytes, number: int) -> Packed:
    characters = np.frombuffer(chunk, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    starts, ends = _stripped(characters, starts, ends)
    lengths = ends - starts
    whole = lengths == DIGITS
    windows = np.lib.stride_tricks.sliding_window_view(characters, DIGITS) if whole.any() else _NO_WINDOWS
    packed, valid = pack(windows[starts[whole]])
    bad = (lengths != 0) & ~whole
    bad[np.flatnonzero(whole)[~valid]] = True
    if bad.any():
        first = int(np.argmax(bad))
        _refuse(url, f"line {number + first}", chunk[starts[first] : ends[first]])
    return packed


_NO_WINDOWS = np.empty((0, DIGITS), np.uint8)


def _stripped(
    characters: npt.NDArray[np.uint8], starts: npt.NDArray[np.intp], ends: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Bounds of lines without the white space around them, of which the first ``DIGITS`` characters a side count."""
    for _ in range(DIGITS):
        before = (starts < ends) & np.isin(characters[np.minimum(starts, len(characters) - 1)], _WHITESPACE)
        after = (starts < ends) & np.isin(characters[np.maximum(ends - 1, 0)], _WHITESPACE)
        if not (before.any() or after.any()):
            break
        starts = starts + before
        ends = np.maximum(ends - after, starts)
    return starts, ends


def _of_parquet(url: str, column: str) -> Iterator[Packed]:
    with open_parquet(url) as parquet:
        names = parquet.schema_arrow.names
        if column not in names:
            there = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise BadInput(f"{url}: has no column {column!r} but {there}; write FILE.parquet:COLUMN")
        row = 1
        for batch in parquet.iter_batches(1 << 16, columns=[column], use_threads=False):
            yield _of_column(url, column, batch.column(0), row)
            row += len(batch)


def _of_column(url: str, column: str, values: pa.Array, row: int) -> Packed:
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise BadInput(f"{url}: column {column!r} is of {kind}, not of text; {HINT}")
    text = pc.utf8_trim_whitespace(values.cast(pa.string()))
    used = pc.fill_null(pc.not_equal(text, ""), False)
    whole = pc.equal(pc.binary_length(text), DIGITS)
    packed, valid = pack(digits_of(text.filter(pc.and_(used, whole))))
    bad = np.array(pc.and_not(used, pc.fill_null(whole, False)), dtype=bool)
    bad[np.flatnonzero(np.array(pc.fill_null(whole, False), dtype=bool))[~valid]] = True
    if bad.any():
        first = int(np.argmax(bad))
        _refuse(url, f"row {row + first} of column {column!r}", text[first].as_py().encode())
    return packed


def _refuse(url: str, where: str, text: bytes) -> NoReturn:
    shown = printable(text[:60].decode("utf-8", "replace")) + ("…" if len(text) > 60 else "")
    raise BadInput(f"{url}: {where} is no uid ({shown!r}); {HINT}")
