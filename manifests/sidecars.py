"""What a sample carries beside its image, text and metadata: nothing wrong with them costs the image.

Reading replaces what cannot be read and notes it; writing keeps what was there beside what we add.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

from .files.bounded_json import is_deeper

MAX_BYTES = 1 << 20  # of a sidecar: real ones have a few kilobytes
MAX_OWN_BYTES = 16 << 20  # of one in a tar of ours, to which stages add, and tables have given what they had
META_TEXT_KEYS = ("caption", "text")  # where a metadata object may hold the caption, if there is no text beside it
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_ESCAPED = re.compile("[\udc80-\udcff]+")


def read_sidecars(
    text: bytes | None, meta: bytes | None, notes: list[str], most: int = MAX_BYTES
) -> tuple[str | None, dict[str, Any] | None]:
    """The caption and the metadata from an image's ``.txt`` and ``.json``; without a text, the metadata's caption.

    One of more than ``most`` bytes is left out, and ``notes`` says so.
    """
    caption = decode_text(text, notes) if text is not None and fits("text", len(text), notes, most) else None
    decoded = decode_meta(meta, notes, most)
    return caption if caption is not None else first_text(decoded or {}, META_TEXT_KEYS), decoded


def fits(kind: str, size: int, notes: list[str], most: int = MAX_BYTES) -> bool:
    """Whether a sidecar of so many bytes is to be read; where not, ``notes`` gets the reason."""
    if size > most:
        notes.append(f"{kind} of {size} bytes, over the limit of {most}: left out")
    return size <= most


def first_text(values: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of ``values`` by ``names`` that is a string."""
    return next((values[name] for name in names if isinstance(values.get(name), str)), None)


def encoding_of(head: bytes) -> str:
    """The encoding that a text's first bytes, its byte-order mark, tell; UTF-8 where there is none."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def decode_text(data: bytes, notes: list[str]) -> str:
    """A text without its byte-order mark; what is not of its encoding is replaced, and ``notes`` says so."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        notes.append(f"text is not {encoding.upper()}: replaced")
        return data.decode(encoding, errors="replace")


def text_stream(stream: BinaryIO) -> io.TextIOWrapper:
    """The text of a file from its first byte on, without its byte-order mark; lines end as they do in the file.

    Bytes that are not UTF-8 come as the surrogates of ``surrogateescape``: :func:`repaired` tells and replaces them.
    """
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")


def repaired(text: str, notes: list[str]) -> str:
    """A text, or the JSON of many, that was read by :func:`text_stream`, as :func:`decode_text` would have given it."""
    replaced = _ESCAPED.sub(lambda run: run[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), text)
    if replaced != text and (note := "text is not UTF-8: replaced") not in notes:
        notes.append(note)
    return replaced


def decode_meta(data: bytes | None, notes: list[str], most: int = MAX_OWN_BYTES) -> dict[str, Any] | None:
    """The metadata object, or None with a note where it is no JSON object, over ``most`` bytes, or nested too deeply
    for who reads it after us."""
    if data is None or not fits("json", len(data), notes, most):
        return None
    try:
        parsed = _parsed(data, notes)
        if is_deeper(parsed):
            raise RecursionError
        value = jsonable(parsed)
    except RecursionError:
        notes.append("json is nested too deeply: left out")
        return None
    except ValueError:
        notes.append("json is unreadable: left out")
        return None
    if not isinstance(value, dict):
        notes.append(f"json is a {type(value).__name__}, not an object: left out")
        return None
    return value


def _parsed(data: bytes, notes: list[str]) -> Any:
    """JSON in any UTF, marked or not; other bytes are replaced, and ``notes`` says so."""
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        notes.append("json is not UTF-8: replaced")
        return json.loads(data.decode("utf-8-sig", "replace"))


def encode_meta(meta: Mapping[str, Any], ours: Mapping[str, Any]) -> bytes:
    """``meta`` with ``ours`` added, as JSON; other values that it had under our names move to ``original_*``.

    Keys are sorted on every level, so that equal rows give equal bytes: one that comes back from the journal has its
    keys in another order. Half a surrogate pair, which JSON may bring, becomes a question mark. Raises RecursionError
    where ``meta`` is nested too deeply, which what :func:`decode_meta` gives never is.
    """
    kept: dict[str, Any] = jsonable(meta)
    moved = {f"original_{name}": kept[name] for name in ours if name in kept and kept[name] != ours[name]}
    return json.dumps({**moved, **kept, **ours}, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")


def jsonable(value: Any) -> Any:
    """``value`` with everything JSON has no word for replaced: NaN by null, bytes left out, dates as ISO text. An
    integer of more than 64 bits becomes its digits as text: `datasets` and others stop at such a number."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value if not isinstance(item, bytes)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
