"""Conversation formats of image datasets: LLaVA and ShareGPT (from, value), OpenAI messages (role, content),
the_cauldron and FineVision (user, assistant)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...manifests.files.bounded_json import is_deeper
from .bounded_rows import may_be_too_deep

CONVERSATION_COLUMNS = ("conversations", "messages", "conversation", "texts")
_USER, _ASSISTANT = "user", "assistant"
_ROLES = {"human": _USER, "user": _USER, "gpt": _ASSISTANT, "assistant": _ASSISTANT, "model": _ASSISTANT}
_MARKS = ("<image>", "<|image|>", "<image_placeholder>")  # image placeholders of trainers


class Turn(NamedTuple):
    """``role``: user, assistant, or any other role in the data, such as system."""

    role: str
    text: str


def turns(value: object) -> list[Turn] | None:
    """Turns of a conversation (also given as JSON text); None if ``value`` is not a conversation."""
    value = _rows(from_json(value))
    if not isinstance(value, list) or not value:
        return None
    parsed: list[Turn] = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        if _ASSISTANT in entry and _USER in entry:
            parsed += [Turn(_USER, _text(entry[_USER])), Turn(_ASSISTANT, _text(entry[_ASSISTANT]))]
            continue
        role = entry.get("from", entry.get("role"))
        content = entry.get("value", entry.get("content"))
        if not isinstance(role, str) or content is None:
            return None
        parsed.append(Turn(_ROLES.get(role.strip().lower(), role), _text(content)))
    return parsed


def first_answer(value: object) -> str | None:
    """First assistant turn: the caption, for a conversation about one image."""
    return next((turn.text for turn in turns(value) or () if turn.role == _ASSISTANT), None)


def exchanges(value: object) -> list[tuple[str, str | None]] | None:
    """Question-answer pairs (answer None if none follows); None if ``value`` is not a conversation."""
    said = turns(value)
    if said is None:
        return None
    pairs: list[tuple[str, str | None]] = []
    for number, turn in enumerate(said):
        if turn.role == _USER:
            following = said[number + 1] if number + 1 < len(said) else None
            answer = following.text if following is not None and following.role == _ASSISTANT else None
            pairs.append((without_marks(turn.text), answer))
    return pairs


def images_in(value: object) -> list[str]:
    """Paths or URLs of the image parts of OpenAI messages."""
    value = from_json(value)
    entries = value if isinstance(value, list) else []
    contents = [entry.get("content") for entry in entries if isinstance(entry, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    names = []
    for part in parts:
        name = part.get("image", part.get("image_url"))
        name = name.get("url") if isinstance(name, Mapping) else name
        if isinstance(name, str) and name:
            names.append(name)
    return names


def without_marks(text: str) -> str:
    """``text`` without image placeholders at its start and end."""
    text = text.strip()
    while mark := next((mark for mark in _MARKS if text.startswith(mark)), None):
        text = text[len(mark) :].lstrip()
    while mark := next((mark for mark in _MARKS if text.endswith(mark)), None):
        text = text[: -len(mark)].rstrip()
    return text


def from_json(value: object) -> object:
    """The parsed value of a text that holds a JSON list or object; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed: object = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return value if may_be_too_deep(value) and is_deeper(parsed) else parsed


def _rows(value: object) -> object:
    """List of turns; older versions of `datasets` store it as one object of lists."""
    if isinstance(value, Mapping) and len(value) == 2 and all(isinstance(column, list) for column in value.values()):
        (first, firsts), (second, seconds) = value.items()
        if len(firsts) == len(seconds):
            return [{first: one, second: other} for one, other in zip(firsts, seconds, strict=True)]
    return value


def _text(content: Any) -> str:
    """Text of a turn: a string, or the joined text parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "\n".join(part for part in parts if isinstance(part, str))
