"""The layouts in which a question of a set has its options and its answer, brought into one: a :class:`RawQuestion`.

A layout is taken where it can be read in one way alone. Whether the question can be used is for :func:`checked` to say.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from ...manifests.status import QuestionStatus
from ...models.quiz import LETTERS, fold
from ..reading.conversations import from_json, without_marks
from .validate import RawQuestion

OPTION_FIELDS = ("options", "choices", "multiple_choices")
#: Where several are filled, they have to name the same option.
ANSWER_FIELDS = (
    "answer",
    "correct_answer",
    "answerKey",
    "answer_key",
    "correct_option",
    "correct_choice",
    "multiple_choice_answer",  # VQA's
)
INDEX_FIELDS = ("answer_index", "answer_idx", "correct_index", "correct_choice_idx")  # the last one is A-OKVQA's
_TEXTS = ("text", "content", "value")  # of an option that is an object
_LABELS = ("label", "key", "id", "letter")

_OPTION_LINE = re.compile(r"\s*(?:[-*•]\s*)?[(（]?(?P<label>[A-KＡ-Ｋ])[.)．）]\s*\S.*")
_OPTION_COLUMN = re.compile(r"[A-K]|(?i:(?:option|choice)[ _-]?(?P<label>[a-k]))")
_OPTIONS_HEADING = re.compile(r"(?i:(?:the )?(?:answer )?(?:options|choices)(?: are)?\s*[:：]?)")
#: What benchmarks and LLaVA's mixes put at a question's end; it tells the form of an answer, and asks nothing.
_INSTRUCTION = re.compile(
    r"(?i:(?:please )?(?:answer|respond|reply)(?: the question| directly)* (?:with|using|by)"
    r"(?:.{0,60}\b(?:options?|choices?)(?:['’]s)? letters?\b.{0,100}"
    r"|.{0,60}\bletters?\b.{0,60}\b(?:options?|choices?|answer)\b.{0,60}"
    r"| an? single word or (?:a )?(?:short )?phrase[.:]?)"
    r"|(?:please )?(?:select|choose|pick) the (?:best|correct|right) (?:answer|option|choice|letter)"
    r"(?: (?:from|to|of|among) .{0,300})?[.:]?)"
)


def read_question(entry: object) -> RawQuestion:
    """A question that is an object, or a pair [question, answer]."""
    if isinstance(entry, list) and len(entry) == 2:
        entry = {"question": entry[0], "answer": entry[1]}
    if not isinstance(entry, Mapping):
        return faulty(f"a question of type {type(entry).__name__}, not an object or a pair")
    text = entry.get("question")
    text = _without_instructions(without_marks(text)) if isinstance(text, str) else text
    answers = _answers(entry) or (None,)
    raw = RawQuestion(text, None, answers[0], entry.get("kind"), also=answers[1:])
    options = next((entry[field] for field in OPTION_FIELDS if not _blank(entry.get(field))), None)
    if options is None:
        options = _columns(entry)
    if options is None and isinstance(text, str):
        return _with_option_lines(text, raw)
    return _with_options(from_json(options), raw)


def faulty(reason: str) -> RawQuestion:
    """What stands for a question that cannot be read."""
    return RawQuestion(None, None, None, fault=(QuestionStatus.MALFORMED, reason))


def _blank(value: object) -> bool:
    """Whether a field is as good as missing: pandas has NaN for an empty cell."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _answers(entry: Mapping[str, object]) -> tuple[object, ...]:
    """All answers that an entry has, those in lists of one by themselves; an index may be text, as CSV has it."""
    found = [entry[field] for field in ANSWER_FIELDS if not _blank(entry.get(field))]
    indices = [entry[field] for field in INDEX_FIELDS if not _blank(entry.get(field))]
    found += [int(each) if isinstance(each, str) and each.isdecimal() else each for each in indices]
    return tuple(each[0] if isinstance(each, list) and len(each) == 1 else each for each in found)


# --- options ---------------------------------------------------------------------------------------------------------


def _columns(entry: Mapping[str, object]) -> object:
    """Options in columns of their own, ``A`` to ``K``, ``option_a`` or ``choiceB``; None where there are no two."""
    found: dict[str, object] = {}
    for name, value in entry.items():
        match = _OPTION_COLUMN.fullmatch(name) if isinstance(name, str) else None
        if match is not None:
            found.setdefault((match["label"] or name).upper(), value)
    return found if sum(not _blank(value) for value in found.values()) >= 2 else None


def _with_options(options: object, raw: RawQuestion) -> RawQuestion:
    """``raw`` with its options as texts: of a list, {"A": ...}, {"text": [...], "label": [...]}, or [{"text": ...}]."""
    if isinstance(options, Mapping):
        texts, labels = options.get("text"), options.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return _labelled(labels, texts, raw)
        return _labelled(list(options), list(options.values()), raw)
    if not isinstance(options, list) or not options or not all(isinstance(option, Mapping) for option in options):
        return RawQuestion(raw.text, options, raw.answer, raw.kind, also=raw.also)
    texts = [next((each[name] for name in _TEXTS if name in each), each) for each in options]
    labels = [next((each[name] for name in _LABELS if name in each), None) for each in options]
    if all(label is None for label in labels):
        return RawQuestion(raw.text, texts, raw.answer, raw.kind, also=raw.also)
    return _labelled(labels, texts, raw)


def _labelled(labels: Sequence[object], texts: Sequence[object], raw: RawQuestion) -> RawQuestion:
    """Options that are named A, B, C, ... or by numbers from 0 or 1; answers by number are put by letter."""
    names = sorted(
        ((_plain(label), place) for place, label in enumerate(labels)), key=lambda each: (len(each[0]), each)
    )
    ordered = [texts[place] for _, place in names]
    while ordered and _blank(ordered[-1]):  # columns, or fields of Parquet, that other questions need
        ordered.pop()
    named = [name for name, _ in names[: len(ordered)]]
    count = len(ordered)
    answers = (raw.answer, *raw.also)
    by_number = any(isinstance(answer, (int, float)) and not isinstance(answer, bool) for answer in answers)
    if by_number and [place for _, place in names] != list(range(len(names))):
        reason = "the answer is an index, and the options' names are not in order; give it as text"
        return _refused(raw, ordered, QuestionStatus.BAD_ANSWER, reason)
    if count <= len(LETTERS) and named == list(LETTERS[:count]):
        return RawQuestion(raw.text, ordered, raw.answer, raw.kind, also=raw.also)
    if named not in ([str(number) for number in range(count)], [str(number + 1) for number in range(count)]):
        given = ", ".join(map(str, labels))[:100]
        reason = f"options that are named {given}, not A, B, C, ... or 1, 2, 3, ..."
        return _refused(raw, ordered, QuestionStatus.BAD_OPTIONS, reason)
    if "0" not in named and by_number:
        reason = "the answer is a number that may be an index from 0 or an option's name; give it as text"
        return _refused(raw, ordered, QuestionStatus.BAD_ANSWER, reason)
    first, *others = [_by_name(answer, named, ordered) for answer in answers]
    return RawQuestion(raw.text, ordered, first, raw.kind, also=tuple(others))


def _refused(raw: RawQuestion, options: object, status: QuestionStatus, reason: str) -> RawQuestion:
    return RawQuestion(raw.text, options, raw.answer, raw.kind, (status, reason))


def _plain(label: object) -> str:
    return unicodedata.normalize("NFKC", str(label)).strip(" ().:").upper()


def _by_name(answer: object, names: Sequence[str], texts: Sequence[object]) -> object:
    """A text among ``names``, which are numbers, by letter and text: :func:`checked` reads that in one way alone.

    Where another option's text is that number, the two are put together and found to differ. Others stay as they are.
    """
    if not isinstance(answer, str) or _plain(answer) not in names:
        return answer
    place = names.index(_plain(answer))
    others = [number for number, text in enumerate(texts) if fold(str(text)) == fold(answer) and number != place]
    return f"{LETTERS[place]}. {texts[others[0] if others else place]}"


def _with_option_lines(text: str, raw: RawQuestion) -> RawQuestion:
    """Options from the text's end. The question is all that is before the last line labelled A, however many lines."""
    lines = text.splitlines()
    labels = [match and _plain(match["label"]) for match in map(_OPTION_LINE.fullmatch, lines)]
    start = next((number for number in reversed(range(len(lines))) if labels[number] == "A"), None)
    if start is None:
        return raw
    head = _without_last(lines[:start], _OPTIONS_HEADING)
    options = [line.strip() for line in lines[start:] if line.strip()]
    other = next((line for line in options if _OPTION_LINE.fullmatch(line) is None), None)
    fault = other and (QuestionStatus.BAD_OPTIONS, f"a line after the first option is none: {other!r}")
    return RawQuestion("\n".join(head), options, raw.answer, raw.kind, fault or None, also=raw.also)


def _without_instructions(text: str) -> str:
    lines = text.splitlines()
    kept = _without_last(lines, _INSTRUCTION)
    return text if len(kept) == len(lines) else "\n".join(kept)


def _without_last(lines: list[str], pattern: re.Pattern[str]) -> list[str]:
    """``lines`` without the last ones that are of ``pattern``, or blank after one that is; never without all."""
    kept = lines
    while True:
        filled = [number for number, line in enumerate(kept) if line.strip()]
        if len(filled) < 2 or pattern.fullmatch(kept[filled[-1]].strip()) is None:
            return kept
        kept = kept[: filled[-2] + 1]
