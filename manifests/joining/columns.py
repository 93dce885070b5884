"""Columns that are joined to the rows of shards: numbers, truth values and text, under a few Arrow types."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
#: Types that joined columns have, by Arrow's names of them.
TYPES: Mapping[str, pa.DataType] = {str(kind): kind for kind in (*_INTEGERS, pa.float32(), pa.float64(), pa.string())}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_KEYWORDS = frozenset({"and", "or", "not", "in", "is", "null"})  # of conditions
_INDEX = "__index_level_"  # an index that pandas wrote


def joined_type(kind: pa.DataType) -> pa.DataType | None:
    """The type under which values of ``kind`` are joined; None for those that are not: lists, structs, dates, bytes.

    Truth values become 0 and 1, decimals and half-precision numbers floats.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return pa.int8()
    if pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.string() if is_text(kind) else TYPES.get(str(kind))


def is_text(kind: pa.DataType) -> bool:
    """True for text of any width, also encoded as a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")


def joined_columns(schema: pa.Schema, without: frozenset[str] = frozenset()) -> dict[str, pa.DataType]:
    """Columns of a file that can be joined, with their types there; ``without``: names to leave out.

    A condition can name only identifiers: columns of other names are left out, as is an index that pandas added.
    """
    found = {}
    for field in schema:
        named = _IDENTIFIER.fullmatch(field.name) is not None and field.name.lower() not in _KEYWORDS
        wanted = named and field.name not in without and not field.name.startswith(_INDEX)
        if wanted and joined_type(field.type) is not None:
            found[field.name] = field.type
    return found


def joined_values(column: pa.Array | pa.ChunkedArray, text: pa.DataType | None = None) -> pa.Array:
    """A column under its joined type, NaN as null. ``text``: the type of text, if not ``string``."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = joined_type(array.type)
    assert kind is not None
    if pa.types.is_string(kind):
        return array.cast(text or kind)
    array = array.cast(kind)
    if not pa.types.is_floating(kind):
        return array
    return pc.if_else(pc.is_nan(array), pa.scalar(None, kind), array)
