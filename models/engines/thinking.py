"""Thinking models: thoughts between tags before an answer, and how to ask for the answer after one.

Whether a model thinks shows in its template (:mod:`.chat_templates`); a server hides it, so there it is probed once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from .base import Engine, GenerationRequest, Prompt, Sampling, Thought

OPENING, CLOSING = "<think>", "</think>"
# Other models' tags: Kimi-VL's, and those of models that learned from Claude.
_OPENING, _CLOSING = re.compile(r"<think(?:ing)?>|◁think▷"), re.compile(r"</think(?:ing)?>|◁/think▷")
GAP = "\n\n"  # between the closing tag and the answer, as in Qwen's and DeepSeek's templates


@dataclass(frozen=True)
class Tags:
    """Format of a model's thoughts. ``begun``: the template's end already opens one. ``gap``: the text after it."""

    begun: bool = False
    gap: str = GAP

    def closed(self, thought: str) -> str:
        """The assistant's turn up to its answer, after whatever the template opened."""
        opening = "" if self.begun else f"{OPENING}\n"
        return f"{opening}{thought.strip()}\n{CLOSING}{self.gap}"


@runtime_checkable
class Thinker(Protocol):
    """An engine that reports whether its model may think before it answers. Raises RequestError and EngineDead."""

    async def thinks(self) -> bool: ...


async def thinks(engine: Engine) -> bool:
    """Whether the engine's model may think first; False for engines that do not report it."""
    return isinstance(engine, Thinker) and await engine.thinks()


async def after_thought(engine: Engine, prompt: Prompt, sampling: Sampling) -> tuple[Prompt, Thought | None]:
    """The prompt with the model's thought about it, after which the answer begins; unchanged where it had none.

    ``sampling``: of the thought, limited to ``max_tokens``; one truncated there is closed as it is.
    """
    thought = (await engine.generate(GenerationRequest(prompt, sampling))).thought
    return (prompt if thought is None else replace(prompt, thought=thought.text)), thought


def split_thought(text: str, begun: bool = False) -> tuple[str, Thought | None]:
    """An answer without the thought before it, and that thought. ``begun``: the prompt had opened it.

    A closing tag with no opening one before it ends a thought as well: not every server knows the model's template.
    """
    thoughts, closed = list[str](), True
    while closed:
        opening, closing = _OPENING.search(text), _CLOSING.search(text)
        opened = opening is not None and not text[: opening.start()].strip()
        alone = closing is not None and (opening is None or closing.start() < opening.start())
        if not (opened or alone or begun):
            break
        start = opening.end() if opening is not None and opened else 0
        closed, begun = closing is not None, False
        thoughts.append(text[start : closing.start() if closing else None].strip())
        text = text[closing.end() :].lstrip() if closing else ""
    return text, Thought("\n".join(filter(None, thoughts)), closed) if thoughts else None
