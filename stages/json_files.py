"""JSON files of many records: a list, read as a stream, or one object, held in memory as a whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from ..errors import BadInput
from .items import open_binary

MAX_OBJECT_BYTES = 1 << 31  # of a JSON object, which is read whole: some five times as much memory
_CHUNK = 1 << 20  # characters
_BLANK = re.compile(r"[ \t\r\n]*")


def begins_list(path: str) -> bool:
    """Whether a file begins like a JSON list. Raises OSError."""
    with open_binary(path) as file:
        return file.read(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def whole_object(path: str) -> Mapping[str, Any] | None:
    """The object that a file is as a whole; None where it is something else, such as JSON lines.

    Raises OSError, and BadInput where it may be one and is larger than MAX_OBJECT_BYTES.
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
    """The values of a JSON list, one after the other. Raises ValueError at what is broken, or nested too deeply."""
    return _ListReader(stream).items()


class _ListReader:
    """A buffer of text that grows only while one value needs it."""

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
            except ValueError:
                if not self._fill():
                    raise
                continue
            except RecursionError:
                raise ValueError("a value is nested too deeply") from None
            after = _blank_end(self._text, end)
            if self._text[after : after + 1] in (",", "]") or not self._fill():  # a number may go on in the next chunk
                self._at = end
                return value

    def _take(self, wanted: str) -> None:
        if (found := self._peek()) != wanted:
            raise ValueError(f"{found!r} where {wanted!r} was expected" if found else "it ends in the middle")
        self._at += 1

    def _peek(self) -> str:
        """The next character that is not blank; none at the end."""
        while True:
            self._at = _blank_end(self._text, self._at)
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _fill(self) -> bool:
        """Read on, twice as much as is held, so that a long value is not scanned too often; False at the end."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        data = self._stream.read(max(_CHUNK, len(rest)))
        self._ended = not data
        self._text, self._at = rest + self._utf8.decode(data, final=self._ended), 0
        return True


def _blank_end(text: str, start: int) -> int:
    found = _BLANK.match(text, start)
    return found.end() if found is not None else start
