"""The health gate: faults of a caption that show in its text alone, whatever the image.

Engines at scale write loops, rows of exclamation marks (a sign of numerical overflow), refusals and captions cut at the
token limit, at rates up to tens of per cent; each is found here and rolled again before it is recorded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ..manifests.status import Status
from ..models.engine import FinishReason, Thought

_RUN = re.compile(r"(\S)\1{7,}|((?:[^\w\s]\s?){12,})")
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m (?:sorry|unable|not able)|i am (?:sorry|unable|not able)|sorry,|i (?:cannot|can['’]?t|can not)\b"
    r"|as an? (?:ai|language model)|i apologi[sz]e|unfortunately, i)",
    re.IGNORECASE,
)


class HealthConfig(BaseModel):
    """Thresholds of the gate. They decide statuses, so they are part of the fingerprint."""

    model_config = ConfigDict(extra="forbid")

    loop_repeats: int = Field(4, ge=2, description="a phrase that often in a row is a loop")
    distinct_words: float = Field(
        0.15, ge=0, le=1, description="smallest share of distinct words in captions of 40 words or more"
    )
    openers: tuple[str, ...] = Field(
        ("sure,", "sure!", "certainly", "of course", "here is a", "here's a", "okay,", "absolutely"),
        description="boilerplate a caption must not begin with (lower case)",
    )
    keep_truncated: bool = Field(False, description="call a caption ok although it was cut at the token limit")


@dataclass(frozen=True)
class Verdict:
    """``status`` ok, or the fault with its reason."""

    status: Status
    reason: str | None = None


def examine(text: str, finish_reason: FinishReason, config: HealthConfig, thought: Thought | None = None) -> Verdict:
    """Judge one caption. The first fault in the order nothing written, degenerate, refused, truncated is reported.

    ``thought``: what the model wrote before it, of which nothing is in ``text``.
    """
    stripped = text.strip()
    if not stripped:
        return unwritten(finish_reason, thought)
    loop = find_loop(stripped, config.loop_repeats)
    if loop is not None:
        return Verdict(Status.DEGENERATE, f"repeats {loop[:40]!r}")
    if _RUN.search(stripped):
        return Verdict(Status.DEGENERATE, "a run of one character or of punctuation")
    words = stripped.lower().split()
    if len(words) >= 40 and len(set(words)) / len(words) < config.distinct_words:
        return Verdict(Status.DEGENERATE, f"{len(set(words))} distinct words in {len(words)}")
    if _REFUSAL.match(stripped):
        return Verdict(Status.REFUSED, f"begins {stripped[:40]!r}")
    opener = next((o for o in config.openers if stripped.lower().startswith(o)), None)
    if opener is not None:
        return Verdict(Status.DEGENERATE, f"boilerplate opener {opener!r}")
    if finish_reason == "length" and not config.keep_truncated:
        return Verdict(Status.TRUNCATED, "cut at the token limit")
    return Verdict(Status.OK)


def unwritten(finish_reason: FinishReason, thought: Thought | None) -> Verdict:
    """The fault of an answer without text: cut before it came, a thought that ends nowhere, or nothing."""
    reason = nothing_written(thought, finish_reason)
    if finish_reason == "length":
        return Verdict(Status.TRUNCATED, reason)
    unended = thought is not None and not thought.closed
    return Verdict(Status.DEGENERATE if unended else Status.EMPTY, reason)


def nothing_written(thought: Thought | None, finish_reason: FinishReason = "stop") -> str:
    """Why there is no text."""
    if finish_reason == "length" and (thought is None or thought.closed):
        return "reasoning that is not shown took all tokens before any text came; allow more by --max-tokens"
    if thought is None:
        return "the model wrote nothing"
    if thought.closed:
        return "the model wrote nothing after its thought"
    return (
        "the model's reasoning did not end; allow more by --max-tokens, or tell its chat template not to let it think "
        "(--template-arg enable_thinking=false)"
    )


def find_loop(text: str, repeats: int, longest: int = 40) -> str | None:
    """A phrase of up to ``longest`` words that occurs ``repeats`` times in a row, or None.

    For each phrase length one pass counts how long the text has been equal to itself that many words earlier:
    ``length * (repeats - 1)`` equal words in a row are ``repeats`` copies. Phrases under 3 words need twice as many
    copies, since lists and rhetoric repeat a word or two in earnest.
    """
    words = text.split()
    for length in range(1, min(longest, len(words) // 2) + 1):
        needed = length * ((repeats if length >= 3 else 2 * repeats) - 1)
        run = 0
        for i in range(length, len(words)):
            run = run + 1 if words[i] == words[i - length] else 0
            if run >= needed:
                return " ".join(words[i - length + 1 : i + 1])
    return None
