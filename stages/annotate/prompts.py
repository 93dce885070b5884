"""Named prompts. A caption's ``prompt_id`` is the name and a hash of the exact text that was sent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput

#: Image before text everywhere, so that several prompts about one image share its prefix in the engine's cache.
NAMED = {
    "plain": "Describe the image.",
    "short": "Describe the image in one short sentence.",
    "dense": "Describe the image in detail.",
    "caprl": "Please describe this image in detail.",  # the prompt CapRL trains and evaluates with
    "none": "",  # the image alone, for captioners that are not chat models
}


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt and the name of its captions."""

    name: str
    text: str

    @property
    def prompt_id(self) -> str:
        return f"{self.name}@{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_prompt(option: str) -> NamedPrompt:
    """Parse a ``--prompt`` option: a known name, ``name=text``, or ``name=@file``. Raises BadInput."""
    name, equals, text = option.partition("=")
    if not name or not name.replace("-", "_").isidentifier():
        raise BadInput(f"--prompt {option!r}: a name is letters, digits, - and _; write name=text, e.g. ocr='Read it.'")
    if not equals:
        if name not in NAMED:
            raise BadInput(f"--prompt {name!r}: no such prompt; there are {', '.join(NAMED)}, or write name=text")
        return NamedPrompt(name, NAMED[name])
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--prompt {option!r}: the file cannot be read ({error}); give a UTF-8 text file") from None
    if not text.strip():
        raise BadInput(f"--prompt {option!r}: the text is empty; write name=text")
    return NamedPrompt(name, text)
