"""What a sample carries beside its image, text and metadata: nothing wrong with them costs the image.

Reading replaces what cannot be read and notes it; writing keeps what was there beside what we add.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def decode_text(data: bytes | None, notes: list[str]) -> str | None:
    """The original caption; bytes that are not UTF-8 are replaced, and ``notes`` says so."""
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        notes.append(f"txt is not UTF-8 (byte {error.start}): replaced")
        return data.decode(errors="replace")


def decode_meta(data: bytes | None, notes: list[str]) -> dict[str, Any] | None:
    """The metadata object, or None with a note where it is no JSON object."""
    if data is None:
        return None
    try:
        value = jsonable(json.loads(data))
    except (ValueError, RecursionError):
        notes.append("json is unreadable: left out")
        return None
    if not isinstance(value, dict):
        notes.append(f"json is a {type(value).__name__}, not an object: left out")
        return None
    return value


def encode_meta(meta: Mapping[str, Any], ours: Mapping[str, Any]) -> bytes:
    """``meta`` with ``ours`` added, as JSON; other values that it had under our names move to ``original_*``.

    Keys are sorted on every level, so that equal rows give equal bytes: one that comes back from the journal has its
    keys in another order. Half a surrogate pair, which JSON may bring, becomes a question mark. Raises RecursionError
    where ``meta`` is nested too deeply.
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
