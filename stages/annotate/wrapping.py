"""Detection of unwanted wrappers around a caption: chat control tokens, reasoning tags, JSON. From the text alone.

Caused by a wrong chat template of the server, and by models tuned for tool calls or grounding.
"""

from __future__ import annotations

import json
import re

_MARKUP = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>"  # <|im_end|>, <|eot_id|>, <|box_start|>, <｜Assistant｜>
    r"|<(?:start|end)_of_(?:turn|image)>|\[/?INST\]|<</?SYS>>|</s>\Z"
    r"|</think(?:ing)?>|◁/?think▷|</?(?:answer|tool_call|tool_response|function_call|box|ref|quad|point)>"
)
_OPENING_MARKUP = re.compile(r"<think(?:ing)?>|<s>|\\boxed\{|(?:#+ *)?(?:assistant|ASSISTANT|Assistant) *(?::|\n)")
_FENCED = re.compile(r"```(?:json|JSON)?\s*\n(?P<inside>.*?)(?:\n\s*```\s*)?", re.DOTALL)
_JSON_BEGUN = re.compile(r"\[?\s*\{\s*[\"'][^\"'\n]{1,60}[\"']\s*:")


def find_wrapper(text: str, json_wanted: bool = False) -> str | None:
    """Description of the wrapper around a caption, or None. ``json_wanted``: the prompt asks for JSON."""
    stripped = text.strip()
    if (markup := _MARKUP.search(stripped) or _OPENING_MARKUP.match(stripped)) is not None:
        return f"chat markup {markup[0].strip()!r}"
    if json_wanted:
        return None
    fenced = _FENCED.fullmatch(stripped)
    inside = fenced["inside"].strip() if fenced is not None else stripped
    if _JSON_BEGUN.match(inside) or _is_json(inside):
        return "JSON around the caption"
    return None


def _is_json(text: str) -> bool:
    """True if the whole text is a JSON object or list."""
    if text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
