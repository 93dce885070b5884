"""Size-bounded rows of text files: a row that is too long or nested too deeply yields its error instead.

At most 2 * MAX_ROW characters of the file are in memory, whatever the length of a row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any, AnyStr

from ...manifests.files.bounded_json import MAX_NESTING, is_deeper

MAX_ROW = 1 << 24  # characters (bytes for JSON lines read as bytes); a 12 MB image in base64 is as long
MAX_HEADING = 1 << 20  # characters of a CSV header
_QUOTE = '"'
csv.field_size_limit(MAX_ROW + 1)  # Python's default of 131,072 is too small for images in base64


class Beyond(str):
    """Error of a row that may be valid, but exceeds the memory limit of a row."""

    __slots__ = ()


TOO_DEEP = Beyond(f"the row is nested too deeply (over {MAX_NESTING} lists and objects in each other)")


def too_long(lines: int = 1) -> Beyond:
    """Error of a row that is too long. ``lines``: number of lines that it spans."""
    over = f"the row is too long (over {MAX_ROW} characters"
    return Beyond(f"{over} in {lines} lines; is a quote not closed?)" if lines > 1 else f"{over})")


def may_be_too_deep(text: str | bytes, start: int = 0, end: int | None = None) -> bool:
    """True if JSON has enough brackets to exceed MAX_NESTING: a cheap test before the exact one."""
    stop = len(text) if end is None else end
    if isinstance(text, bytes):
        return text.count(b"[", start, stop) + text.count(b"{", start, stop) > MAX_NESTING
    return text.count("[", start, stop) + text.count("{", start, stop) > MAX_NESTING


def bounded_lines(stream: IO[AnyStr]) -> Iterator[AnyStr | Beyond]:
    """Lines of a file, with an error in place of each line that is too long."""
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
    """A JSONL line parsed to a row, or its error."""
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
    """CSV records, or an error in place of a record; the first line has been read already."""
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
    """Line iterator for ``csv.reader``, which requests further lines while a quoted field is open.

    ``held``: lines of the current record. Raises _TooLong at the line that makes the record too long.
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
        """The next piece of the current line, or of the next line; empty at the end."""
        return self._stream.readline(1 << 20)


def _skip(feed: _Feed, delimiter: str) -> int:
    """Skip to the end of a record that is too long; returns the number of lines it spans."""
    state, lines = _START, 0
    pieces = iter(feed.held)
    while piece := next(pieces, None) or feed.more():
        state = _after(piece, state, delimiter)
        lines += _is_ended(piece)
        if _is_ended(piece) and state != _QUOTED:
            return lines
    return lines + 1


_START, _PLAIN, _QUOTED, _CLOSED = range(4)  # start of a field, unquoted field, quoted field, after a quote in one


def _after(text: str, state: int, delimiter: str) -> int:
    """State of Python's CSV reader after ``text``."""
    at, end = 0, len(text)
    while at < end:
        if state in (_PLAIN, _QUOTED):
            index = text.find(delimiter if state == _PLAIN else _QUOTE, at)
            if index < 0:
                return state
            at, state = index + 1, _START if state == _PLAIN else _CLOSED
            continue
        if text[at] == _QUOTE:
            at, state = at + 1, _QUOTED
        elif text[at] == delimiter:
            at, state = at + 1, _START
        else:
            at, state = at + 1, _PLAIN
    return state
