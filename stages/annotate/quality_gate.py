"""Quality gate: detects faulty captions from their text alone, independent of the image.

At scale, engines produce loops, runs of exclamation marks (a sign of numerical overflow), refusals and captions cut at
the token limit, at rates up to tens of per cent; each is detected here and resampled before it is recorded. The text of
images full of text (tables, forms, dot leaders, rules, figures, laughter, quoted apologies) must pass.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ...manifests.status import Status
from ...models.engines.base import FinishReason, Thought
from .loops import SHORT, Loop, distinct_share, loops_in, units_of
from .refusals import begins_with_inscription, is_refusal

_RUN = re.compile(r"(\S)(?:\s*\1)+")
_SIGNS = re.compile(r"(?:[^\w\n]|_)+")
_CLAUSE_END = re.compile(r"\w.*[.,!?،؛؟।。，、！？]$|^[。，、！？；]+$", re.DOTALL)
_SMALL_WORDS = (
    "a an and are as at by from in is it of on that the there this to with ein eine und der die das den dem ist mit "
    "von le la les un une et des du est dans avec el los las una y de con que es en o os as um uma e em com il lo gli "
    "di и в на с по из على من في एक और में है"
)
_FUNCTION_WORDS = frozenset(_SMALL_WORDS.split())
_OVERFLOW = 12  # consecutive "!": the first token of many vocabularies, produced if all logits are NaN
_RULE = 5  # factor by which rules, dot leaders and blanks to fill in may be longer than other runs
_TABLE = 6  # factor for table rows, which may legitimately be equal
_FEW_WORDS = 40  # the share of distinct words needs at least as many words

_OPENERS = (
    "sure,|sure!|certainly,|certainly!|certainly.|certainly:|certainly here|absolutely|okay,|here is a|here's a"
    "|of course,|of course!|of course.|of course:|of course here"
    "|natürlich,|natürlich!|gerne!|hier ist eine beschreibung|hier ist eine detaillierte beschreibung"
    "|bien sûr,|bien sûr !|bien sûr!|voici une description|claro,|¡claro|por supuesto,|aquí tienes una"
    "|好的，|好的,|当然，|当然！|当然可以|當然，|以下是对|以下是这张|以下是该"
    "|もちろん、|はい、|承知しました|かしこまりました|以下はこの画像|以下は、この画像"
)


class QualityGateConfig(BaseModel):
    """Thresholds of the gate. They affect statuses, so they are part of the fingerprint."""

    model_config = ConfigDict(extra="forbid")

    loop_repeats: int = Field(
        4, ge=2, description="copies in a row of a sentence or clause that are a loop; short phrases need more"
    )
    longest_run: int = Field(
        40,
        ge=2,
        description="longest run of one letter, figure or symbol; rules and leaders may be 5 times as long",
    )
    distinct_words: float = Field(
        0.15, ge=0, le=1, description="smallest share of distinct words in captions of 40 words or more"
    )
    openers: tuple[str, ...] = Field(
        tuple(_OPENERS.split("|")), description="boilerplate a caption must not begin with (lower case)"
    )
    keep_truncated: bool = Field(False, description="call a caption ok although it was cut at the token limit")


@dataclass(frozen=True)
class GateResult:
    """Result of the gate: ``status`` ok, or the fault with its reason."""

    status: Status
    reason: str | None = None


def check_caption(
    text: str, finish_reason: FinishReason, config: QualityGateConfig, thought: Thought | None = None
) -> GateResult:
    """Check one caption; reports the first fault in the order unwritten, degenerate, refused, truncated.

    ``thought``: the model's reasoning before the caption, which is not part of ``text``.
    """
    stripped = text.strip()
    if not stripped:
        return unwritten(finish_reason, thought)
    repetition = find_repetition(stripped, config)
    if repetition is not None:
        return GateResult(Status.DEGENERATE, repetition)
    if is_refusal(stripped):
        return GateResult(Status.REFUSED, f"begins {stripped[:40]!r}")
    opener = next((o for o in config.openers if stripped.lower().startswith(o)), None)
    if opener is not None and not begins_with_inscription(stripped):
        return GateResult(Status.DEGENERATE, f"boilerplate opener {opener!r}")
    if finish_reason == "length" and not config.keep_truncated:
        return GateResult(Status.TRUNCATED, "cut at the token limit")
    return GateResult(Status.OK)


def unwritten(finish_reason: FinishReason, thought: Thought | None) -> GateResult:
    """Fault of an answer without text: cut before any text, an unclosed thought, or empty."""
    reason = nothing_written(thought, finish_reason)
    if finish_reason == "length":
        return GateResult(Status.TRUNCATED, reason)
    unended = thought is not None and not thought.closed
    return GateResult(Status.DEGENERATE if unended else Status.EMPTY, reason)


def nothing_written(thought: Thought | None, finish_reason: FinishReason = "stop") -> str:
    """Reason why there is no text."""
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


def find_repetition(text: str, config: QualityGateConfig) -> str | None:
    """Reason why a text is degenerate, or None: a loop, a run of one character or of signs, few distinct words."""
    units = units_of(text, rows=True)
    for loop in loops_in(units, config.loop_repeats):
        if loop.copies >= _copies_allowed(loop, config):
            return f"repeats {loop.of(text)[:40]!r}"
    run = _find_run(text, config.longest_run)
    if run is not None:
        return run
    if sum(unit.words for unit in units) >= _FEW_WORDS:
        distinct, words = distinct_share(units)
        if words >= _FEW_WORDS and distinct / words < config.distinct_words:
            return f"{distinct} distinct words in {words}"
    return None


def _copies_allowed(loop: Loop, config: QualityGateConfig) -> float:
    """Number of copies from which on a phrase is a loop: smallest for prose, which is rarely repeated on purpose."""
    repeats, phrase = config.loop_repeats, loop.phrase
    if all(unit.row for unit in phrase):
        return _TABLE * repeats
    signs = [c for unit in phrase for c in unit.text]
    if not any(c.isalpha() for c in signs):  # numbers of a table, a rule of two signs
        return _RULE * config.longest_run / len(signs)
    if len(signs) == 1:  # a run of one character, see _find_run
        return config.longest_run
    if loop.words < 0.5 and all(unit.of_long_word for unit in phrase):  # within a long word: tags, DNA ("ATATAT")
        return 2 * config.longest_run / len(signs)
    if loop.words < SHORT:
        return 3 * repeats
    return repeats if any(_is_prose(unit.text) for unit in phrase) else 2 * repeats


def _is_prose(word: str) -> bool:
    """True if a word ends a clause or is a function word, which lists of labels, weekdays or keys lack."""
    return _CLAUSE_END.search(word) is not None or word.lower() in _FUNCTION_WORDS


def _find_run(text: str, longest: int) -> str | None:
    """A run of one character (spaces allowed) or of signs alone that is too long for the text of any image."""
    written = sum(not c.isspace() for c in text)
    for match in _RUN.finditer(text.replace("\ufe0f", "")):
        character, times = match[1], match[0].count(match[1])
        rule = _is_rule(character)
        if times > (_RULE * longest if rule else longest) or (character == "!" and times >= _OVERFLOW):
            return f"a run of {times} {character!r}"
        if 2 * times >= longest and times > written * (0.8 if rule else 0.5):  # most of the text
            return f"a run of {times} {character!r}"
    for match in _SIGNS.finditer(text):
        times = sum(not c.isspace() for c in match[0])
        if times > _RULE * longest:
            return f"a run of {times} signs"
    return None


def _is_rule(character: str) -> bool:
    """True for characters of rules, leaders and blanks: punctuation, ASCII signs, box drawing; not emoji or stars."""
    category = unicodedata.category(character)
    return category[0] in "PS" and (category != "So" or "\u2500" <= character <= "\u25ff")
