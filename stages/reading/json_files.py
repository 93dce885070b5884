"""JSON files of many records: a list, parsed as a stream, or one object, held in memory as a whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from ...errors import BadInput
from ...manifests.files.bounded_json import is_deeper
from .bounded_rows import MAX_ROW, TOO_DEEP, may_be_too_deep, too_long
from .files import open_binary

MAX_OBJECT_BYTES = 1 << 31  # of a JSON object, which is read whole and takes some five times as much memory
_CHUNK = 1 << 20  # characters
_MARKS, _IN_TEXT = re.compile(r'["\[\]{}]'), re.compile(r'["\\]')
_BLANK = re.compile(r"[ \t\r\n]*")


def begins_list(path: str) -> bool:
    """True if a file starts like a JSON list. Raises OSError."""
    with open_binary(path) as file:
        return file.read(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def whole_object(path: str) -> Mapping[str, Any] | None:
    """The JSON object that a whole file holds; None for anything else, such as JSON lines.

    Raises OSError, and BadInput if it may be an object and is larger than MAX_OBJECT_BYTES.
    """
    with open_binary(path) as file:
        first = b"\n"
        while first.strip() == b"" and first:  # blank lines at the start
            first = file.readline(MAX_OBJECT_BYTES + 1).removeprefix(codecs.BOM_UTF8)
        if not first.lstrip().startswith(b"{"):
            return None
        if len(first) <= MAX_OBJECT_BYTES and (value := _object(first)) is not None:
            return None if any(line.strip() for line in file) else value
        size = file.seek(0, 2)
        if size > MAX_OBJECT_BYTES:
            text = f"{path}: a JSON object of {size} bytes, over {MAX_OBJECT_BYTES}, for it is held in memory"
            raise BadInput(f"{text}; give its records as JSON lines, or as a list")
        file.seek(0)
        return _object(file.read())


def _object(data: bytes) -> Mapping[str, Any] | None:
    try:
        value = json.loads(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def list_items(stream: BinaryIO) -> Iterator[Any]:
    """Values of a JSON list, one by one; Beyond for one that is too long or too deep.

    Raises ValueError at invalid JSON.
    """
    return _ListReader(stream).items()


class _ListReader:
    """Streaming parser: its text buffer grows only while a single value needs it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def items(self) -> Iterator[Any]:
        self._take("[")
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._at += 1
                yield self._value()
        self._take("]")
        if self._peek():
            raise ValueError("there is more after the end of the list")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except RecursionError:
                self._skip()
                return TOO_DEEP
            except ValueError:
                if len(self._text) - self._at > MAX_ROW and self._peek() in '[{"':
                    if self._skip() <= MAX_ROW:  # the value is invalid, and what follows it is long
                        raise
                    return too_long()
                if not self._fill():
                    raise
                continue
            after = _blank_end(self._text, end)
            if self._text[after : after + 1] in (",", "]") or not self._fill():  # a number may go on in the next one
                length, deep = end - self._at, may_be_too_deep(self._text, self._at, end) and is_deeper(value)
                self._at = end
                return too_long() if length > MAX_ROW else TOO_DEEP if deep else value

    def _skip(self) -> int:
        """Skip a list, object or string by its brackets and quotes alone; returns its length in characters.

        Raises ValueError if it does not end.
        """
        depth, quoted, escaped, passed = 0, False, False, 0
        while True:
            at = self._at + escaped
            escaped = False
            while match := (_IN_TEXT if quoted else _MARKS).search(self._text, at):
                mark, at = match[0], match.end()
                if mark == "\\":
                    escaped = at == len(self._text)
                    at += 1
                    continue
                quoted ^= mark == '"'
                depth += (mark in "[{") - (mark in "]}")
                if not quoted and depth <= 0:
                    length, self._at = passed + at - self._at, at
                    return length
            passed += len(self._text) - self._at
            self._at = len(self._text)
            if not self._fill():
                raise ValueError("it ends in the middle of a value")

    def _take(self, wanted: str) -> None:
        if (character := self._peek()) != wanted:
            raise ValueError(f"{character!r} where {wanted!r} was expected" if character else "it ends in the middle")
        self._at += 1

    def _peek(self) -> str:
        """The next non-blank character; empty at the end."""
        while True:
            self._at = _blank_end(self._text, self._at)
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _fill(self) -> bool:
        """Double the buffer, so that a long value is not rescanned too often; False at the end."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        data = self._stream.read(max(_CHUNK, len(rest)))
        self._ended = not data
        self._text, self._at = rest + self._utf8.decode(data, final=self._ended), 0
        return True


def _blank_end(text: str, start: int) -> int:
    match = _BLANK.match(text, start)
    return match.end() if match is not None else start
