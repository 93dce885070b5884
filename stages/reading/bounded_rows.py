"""Rows of text files, each of bounded size: one that is longer, or nested deeper, is one row with its reason.

Whatever the length of a row, at most twice MAX_ROW characters of the file are in memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any, AnyStr

from ...manifests.files.bounded_json import MAX_NESTING, is_deeper

MAX_ROW = 1 << 24  # characters (of JSON lines in bytes: bytes); an image of 12 MB is as long in base64
MAX_HEADING = 1 << 20  # characters of a CSV's first line
_QUOTE = '"'
csv.field_size_limit(MAX_ROW + 1)  # Python's own 131,072 are fewer than an image in base64 has


class Beyond(str):
    """Why a row is not taken that may be sound: it is more than is held in memory for one."""

    __slots__ = ()


TOO_DEEP = Beyond(f"the row is nested too deeply (over {MAX_NESTING} lists and objects in each other)")


def too_long(lines: int = 1) -> Beyond:
    """``lines``: of the file, that the row takes up."""
    over = f"the row is too long (over {MAX_ROW} characters"
    return Beyond(f"{over} in {lines} lines; is a quote not closed?)" if lines > 1 else f"{over})")


def may_be_too_deep(text: str | bytes, start: int = 0, end: int | None = None) -> bool:
    """Whether JSON has so many brackets that its value is worth asking about."""
    stop = len(text) if end is None else end
    if isinstance(text, bytes):
        return text.count(b"[", start, stop) + text.count(b"{", start, stop) > MAX_NESTING
    return text.count("[", start, stop) + text.count("{", start, stop) > MAX_NESTING


def bounded_lines(stream: IO[AnyStr]) -> Iterator[AnyStr | Beyond]:
    """The lines of a file."""
    while line := stream.readline(MAX_ROW + 1):
        if len(line) <= MAX_ROW:
            yield line
            continue
        while line and not _is_ended(line):
            line = stream.readline(1 << 20)
        yield too_long()


def _is_ended(line: str | bytes) -> bool:
    return line.endswith(b"\n") if isinstance(line, bytes) else line.endswith(("\n", "\r"))


def json_row(line: bytes | str) -> Mapping[str, Any] | str:
    """A line of JSONL as a row, or what is wrong with it."""
    if isinstance(line, Beyond):
        return line
    try:
        value = json.loads(line)
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        return f"line is not JSON: {error}"
    if not isinstance(value, dict):
        return f"line is a JSON {type(value).__name__}, not an object"
    return TOO_DEEP if may_be_too_deep(line) and is_deeper(value) else value


def csv_records(stream: IO[str], heading: str, delimiter: str) -> Iterator[list[str] | str]:
    """The records of a CSV whose first line was read already, or what is wrong with one."""
    feed = _Feed(stream, heading)
    reader = csv.reader(feed, delimiter=delimiter)
    while True:
        feed.held.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except _TooLong:
            yield too_long(_skip(feed, delimiter))
        except csv.Error as error:
            yield f"row cannot be read: {error}"


class _TooLong(Exception):
    pass


class _Feed:
    """The lines of a CSV for Python's reader, which asks for another one while a quoted field is open.

    ``held``: those of the record that is being read. Raises _TooLong with the one that makes it too long.
    """

    def __init__(self, stream: IO[str], first: str) -> None:
        self.held: list[str] = []
        self._stream, self._first = stream, first

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, self._first = self._first or self._stream.readline(MAX_ROW + 1), ""
        if not line:
            raise StopIteration
        self.held.append(line)
        if len(line) > MAX_ROW or (len(self.held) > 1 and sum(map(len, self.held)) > MAX_ROW):
            raise _TooLong
        return line

    def more(self) -> str:
        """Some more of a line or the next one, empty at the end."""
        return self._stream.readline(1 << 20)


def _skip(feed: _Feed, delimiter: str) -> int:
    """Go on to the end of a record that is too long; returns how many lines it took up."""
    state, lines = _START, 0
    pieces = iter(feed.held)
    while piece := next(pieces, None) or feed.more():
        state = _after(piece, state, delimiter)
        lines += _is_ended(piece)
        if _is_ended(piece) and state != _QUOTED:
            return lines
    return lines + 1


_START, _PLAIN, _QUOTED, _CLOSED = range(4)  # at a field's start, in a bare one, in a quoted one, after a quote in it


def _after(text: str, state: int, delimiter: str) -> int:
    """What Python's reader would be in after some more of a record."""
    at, end = 0, len(text)
    while at < end:
        if state in (_PLAIN, _QUOTED):
            found = text.find(delimiter if state == _PLAIN else _QUOTE, at)
            if found < 0:
                return state
            at, state = found + 1, _START if state == _PLAIN else _CLOSED
            continue
        if text[at] == _QUOTE:
            at, state = at + 1, _QUOTED
        elif text[at] == delimiter:
            at, state = at + 1, _START
        else:
            at, state = at + 1, _PLAIN
    return state
