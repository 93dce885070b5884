"""Sidecars of a sample, text and metadata: errors in them never cost the image.

Reading replaces what cannot be decoded and notes it; writing keeps existing keys beside those we add.
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

MAX_BYTES = 1 << 20  # largest sidecar; real ones have a few kilobytes
MAX_OWN_BYTES = 16 << 20  # largest sidecar in a tar of ours: stages add keys, and rows of tables may be large
META_TEXT_KEYS = ("caption", "text")  # keys of the caption in a metadata object, if there is no text file
_MARKS = (  # UTF-32's little-endian mark starts with UTF-16's
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
    """Caption and metadata from an image's ``.txt`` and ``.json``; without a text, the metadata's caption.

    A sidecar of more than ``most`` bytes is skipped, with an entry in ``notes``.
    """
    caption = decode_text(text, notes) if text is not None and fits("text", len(text), notes, most) else None
    decoded = decode_meta(meta, notes, most)
    return caption if caption is not None else first_text(decoded or {}, META_TEXT_KEYS), decoded


def fits(kind: str, size: int, notes: list[str], most: int = MAX_BYTES) -> bool:
    """True if a sidecar of this size is to be read; otherwise ``notes`` gets the reason."""
    if size > most:
        notes.append(f"{kind} of {size} bytes, over the limit of {most}: left out")
    return size <= most


def first_text(values: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of ``values`` by ``names`` that is a string."""
    return next((values[name] for name in names if isinstance(values.get(name), str)), None)


def encoding_of(head: bytes) -> str:
    """Encoding by a text's byte-order mark (its first bytes); UTF-8 if there is none."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def decode_text(data: bytes, notes: list[str]) -> str:
    """A text without its byte-order mark; undecodable bytes are replaced, with an entry in ``notes``."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        notes.append(f"text is not {encoding.upper()}: replaced")
        return data.decode(encoding, errors="replace")


def text_stream(stream: BinaryIO) -> io.TextIOWrapper:
    """A file's text from its first byte on, without its byte-order mark; line ends are kept.

    Bytes that are not UTF-8 are returned as ``surrogateescape`` surrogates: :func:`repaired` notes and replaces them.
    """
    encoding = encoding_of(stream.read(4))
    stream.seek(0)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")


def repaired(text: str, notes: list[str]) -> str:
    """A text, or JSON of many texts, read by :func:`text_stream`, as :func:`decode_text` would return it."""
    replaced = _ESCAPED.sub(lambda run: run[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), text)
    if replaced != text and (note := "text is not UTF-8: replaced") not in notes:
        notes.append(note)
    return replaced


def decode_meta(data: bytes | None, notes: list[str], most: int = MAX_OWN_BYTES) -> dict[str, Any] | None:
    """The metadata object, or None with a note if it is no JSON object, over ``most`` bytes, or nested too deeply."""
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
    """JSON in any UTF, with or without a mark; other bytes are replaced, with an entry in ``notes``."""
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        notes.append("json is not UTF-8: replaced")
        return json.loads(data.decode("utf-8-sig", "replace"))


def encode_meta(meta: Mapping[str, Any], ours: Mapping[str, Any]) -> bytes:
    """``meta`` with ``ours`` added, as JSON; different values that it had under our names move to ``original_*``.

    Keys are sorted on every level, so that equal rows give equal bytes: a row read back from the journal has its keys
    in another order. Unpaired surrogates, which JSON may contain, become question marks. Raises RecursionError if
    ``meta`` is nested too deeply, which results of :func:`decode_meta` never are.
    """
    kept: dict[str, Any] = jsonable(meta)
    moved = {f"original_{name}": kept[name] for name in ours if name in kept and kept[name] != ours[name]}
    return json.dumps({**moved, **kept, **ours}, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")


def jsonable(value: Any) -> Any:
    """``value`` with everything that JSON cannot express replaced: NaN by null, bytes omitted, dates as ISO text. An
    integer of more than 64 bits becomes text: `datasets` and others fail on such a number."""
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
