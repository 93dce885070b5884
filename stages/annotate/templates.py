"""Prompts with the row in them: ``{text}``, ``{meta.KEY}`` and ``{captions.NAME}``; all other braces stay as they are.

A template is gone through once, so braces in a value are never read as a field. A value is data: it is bounded, a value
of the row is one line, and whatever could pass for a tag is broken up (:func:`~...models.quiz.plain`; engines do the
same with the control tokens of their tokenizers, :mod:`...models.engines.plain_text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ...models.quiz import one_line, plain

_FIELD = re.compile(r"\{(?:(?P<text>text)|meta\.(?P<key>[^{}\"'\r\n]{1,200})|captions\.(?P<name>[\w-]+))\}")
_ALIKE = re.compile(r"\{\s*[A-Za-z_][\w.#-]*\s*\}")
#: Characters that nobody sees: C0 and C1 controls but for line breaks and tabs, and Unicode's invisible tag characters.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\U000e0000-\U000e007f]")
_BLANK = re.compile(r"\s")
_LOOKED_AT = 16  # of a longer value so many times its limit: blanks and invisible characters do not count
ELLIPSIS = "…"


class Field(NamedTuple):
    """A field of a template. ``name``: the metadata's key or the prompt's name, empty for the text."""

    kind: Literal["text", "meta", "captions"]
    name: str = ""

    def __str__(self) -> str:
        return f"{{{self.kind}.{self.name}}}" if self.name else f"{{{self.kind}}}"


class Lacking(Exception):
    """The row has no value for a ``field``."""

    def __init__(self, field: Field) -> None:
        super().__init__(f"the row lacks {field}")
        self.field = field


def fields(template: str) -> Iterator[Field]:
    """The template's fields in their order, as often as they occur."""
    return (_field(match) for match in _FIELD.finditer(template))


def caption_names(template: str) -> list[str]:
    """The prompts whose captions a template takes, each once."""
    return list(dict.fromkeys(field.name for field in fields(template) if field.kind == "captions"))


def without_fields(template: str) -> str:
    """The template's own text."""
    return _FIELD.sub("", template)


def resembling(template: str) -> list[str]:
    """Words in braces that resemble a field and are none: ``{caption}``, ``{ text }``, ``{meta}``."""
    return list(dict.fromkeys(match[0] for match in _ALIKE.finditer(without_fields(template))))


def filled(template: str, value: Callable[[Field], str | None]) -> str:
    """The template with a value in place of each field. Raises Lacking for the first field without one."""

    def put(match: re.Match[str]) -> str:
        field = _field(match)
        found = value(field)
        if not found:
            raise Lacking(field)
        return found

    return _FIELD.sub(put, template)


def _field(match: re.Match[str]) -> Field:
    if match["text"]:
        return Field("text")
    return Field("meta", match["key"]) if match["key"] else Field("captions", match["name"])


# --- values ----------------------------------------------------------------------------------------------------------


def row_value(field: Field, text: str | None, meta: Mapping[str, Any] | None, most: int) -> str | None:
    """The value of ``{text}`` or ``{meta.KEY}``: one line of at most ``most`` bytes; None if there is none.

    A string is taken as it is, anything else as JSON. Null, blank strings and empty lists and objects are no value.
    """
    value = text if field.kind == "text" else looked_up(meta or {}, field.name)
    if value is None or value in ("", [], {}):
        return None
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return cut(one_line(_visible(written, most)), most) or None


def caption_value(text: str, most: int) -> str:
    """A caption in a later prompt: its lines stay, as a caption may be a list or a table."""
    return cut(plain(_visible(text, most)).strip(), most)


def looked_up(meta: Mapping[str, Any], key: str) -> Any:
    """The value under ``key``, else the one that its dots lead to in nested objects; None if there is none."""
    if key in meta:
        return meta[key]
    value: Any = meta
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def cut(text: str, most: int) -> str:
    """A text of at most ``most`` bytes of UTF-8: a longer one ends at a blank before that, with an ellipsis."""
    data = text.encode()
    if len(data) <= most:
        return text
    kept = data[: most - len(ELLIPSIS.encode())].decode(errors="ignore")
    blanks = [match.start() for match in _BLANK.finditer(kept, len(kept) // 2)]
    return (kept[: blanks[-1]] if blanks else kept) + ELLIPSIS


def _visible(text: str, most: int) -> str:
    """The beginning of a text without what nobody sees; half a surrogate pair, which is no character, becomes "?"."""
    begun = text.lstrip()[: _LOOKED_AT * most]
    return _INVISIBLE.sub("", begun).encode("utf-8", "replace").decode()
