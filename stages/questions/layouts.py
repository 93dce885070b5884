"""Layouts of multiple-choice questions in question sets, normalised to :class:`RawQuestion`.

A layout is accepted only if it is unambiguous. :func:`checked` decides whether the question is usable.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from ...manifests.status import QuestionStatus
from ...models.quiz import LETTERS, fold
from ..reading.conversations import from_json, without_marks
from ..reading.python_list import from_python
from .validate import RawQuestion

OPTION_FIELDS = ("options", "choices", "multiple_choices")
#: If several are filled, they must name the same option.
ANSWER_FIELDS = (
    "answer",
    "correct_answer",
    "answerKey",
    "answer_key",
    "correct_option",
    "correct_choice",
    "multiple_choice_answer",  # VQA's
)
#: Of ChartQA's own files: the question and its answer.
CHART_FIELDS = ("query", "label")
INDEX_FIELDS = ("answer_index", "answer_idx", "correct_index", "correct_choice_idx")  # the last one is A-OKVQA's
_TEXTS = ("text", "content", "value")  # fields of an option that is an object
_LABELS = ("label", "key", "id", "letter")

_OPTION_LINE = re.compile(r"\s*(?:[-*•]\s*)?[(（]?(?P<label>[A-KＡ-Ｋ])[.)．）]\s*\S.*")
_OPTION_COLUMN = re.compile(r"[A-K]|(?i:(?:option|choice)[ _-]?(?P<label>[a-k]))")
_OPTIONS_HEADING = re.compile(r"(?i:(?:the )?(?:answer )?(?:options|choices)(?: are)?\s*[:：]?)")
#: Answer-format instructions at the end of questions, as in benchmarks and LLaVA's mixes; not part of the question.
_INSTRUCTION = re.compile(
    r"(?i:(?:please )?(?:answer|respond|reply)(?: the question| directly)* (?:with|using|by)"
    r"(?:.{0,60}\b(?:options?|choices?)(?:['’]s)? letters?\b.{0,100}"
    r"|.{0,60}\bletters?\b.{0,60}\b(?:options?|choices?|answer)\b.{0,60}"
    r"| an? single word or (?:a )?(?:short )?phrase[.:]?)"
    r"|(?:please )?(?:select|choose|pick) the (?:best|correct|right) (?:answer|option|choice|letter)"
    r"(?: (?:from|to|of|among) .{0,300})?[.:]?)"
)
#: What a reference to one of several images looks like in MMMU, in a question or in place of an option.
_IMAGE_MARK = re.compile(r"<image ?[1-9]>")
#: Beginnings of prompts in Prism's and VLMEvalKit's files; of hints only the one about the form of the answer.
_PROMPT_HEAD = re.compile(r"(?i:hint: please (?:answer|provide)[^\n]*\n\s*)?(?i:question:)\s*")


def read_question(entry: object) -> RawQuestion:
    """Read a question given as an object, or as a pair [question, answer].

    The text is in ``question``, or else in ``prompt`` (Prism's files, which CapRL's evaluation reads), with or without
    options in its last lines; or in ``query`` beside a ``label``, its answer (ChartQA).
    """
    if isinstance(entry, list) and len(entry) == 2:
        entry = {"question": entry[0], "answer": entry[1]}
    if not isinstance(entry, Mapping):
        return faulty(f"a question of type {type(entry).__name__}, not an object or a pair")
    text = entry.get("question")
    if text is None and all(name in entry for name in CHART_FIELDS):
        text = entry["query"]
        entry = {"answer": entry["label"], **entry}
    if text is None and isinstance(entry.get("prompt"), str):
        text = _of_prompt(without_marks(entry["prompt"]))
    text = _without_instructions(_about_the_image(without_marks(text))) if isinstance(text, str) else text
    answers = _answers(entry) or (None,)
    raw = RawQuestion(text, None, answers[0], entry.get("kind"), also=answers[1:])
    options = next((entry[field] for field in OPTION_FIELDS if not _blank(entry.get(field))), None)
    if options is None:
        options = _columns(entry)
    if options is None and isinstance(text, str):
        return _with_option_lines(text, raw)
    return _with_options(_listed(options), raw)


def faulty(reason: str) -> RawQuestion:
    """Placeholder of a question that cannot be read."""
    return RawQuestion(None, None, None, fault=(QuestionStatus.MALFORMED, reason))


def _blank(value: object) -> bool:
    """True if a field is missing or empty: pandas has NaN for an empty cell."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _answers(entry: Mapping[str, object]) -> tuple[object, ...]:
    """All answers of an entry, one-element lists unpacked; an index may be text, as in CSV.

    A list of texts in ``answers`` (DocVQA) counts if there is nothing else: VQA has objects there.
    """
    answers = [entry[field] for field in ANSWER_FIELDS if not _blank(entry.get(field))]
    indices = [entry[field] for field in INDEX_FIELDS if not _blank(entry.get(field))]
    answers += [int(answer) if isinstance(answer, str) and answer.isdecimal() else answer for answer in indices]
    accepted = entry.get("answers")
    if not answers and isinstance(accepted, list) and all(isinstance(answer, str) for answer in accepted):
        answers = [accepted]
    return tuple(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer for answer in answers)


# --- options ---------------------------------------------------------------------------------------------------------


def _listed(options: object) -> object:
    """The value of a text that holds options in JSON or as a list in Python's notation; any other value unchanged."""
    parsed = from_json(options)
    listed = from_python(parsed) if isinstance(parsed, str) else None
    return parsed if listed is None else listed


def _columns(entry: Mapping[str, object]) -> object:
    """Options in separate columns, ``A`` to ``K``, ``option_a`` or ``choiceB``; None if there are fewer than two."""
    options: dict[str, object] = {}
    for name, value in entry.items():
        match = _OPTION_COLUMN.fullmatch(name) if isinstance(name, str) else None
        if match is not None:
            options.setdefault((match["label"] or name).upper(), value)
    return options if sum(not _blank(value) for value in options.values()) >= 2 else None


def _with_options(options: object, raw: RawQuestion) -> RawQuestion:
    """``raw`` with options as texts, from a list, {"A": ...}, {"text": [...], "label": [...]}, or [{"text": ...}]."""
    if isinstance(options, Mapping):
        texts, labels = options.get("text"), options.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return _labelled(labels, texts, raw)
        return _labelled(list(options), list(options.values()), raw)
    if isinstance(options, list) and any(_is_image(option) for option in options):
        reason = "an option is another image, of which a caption of this one says nothing"
        return _refused(raw, options, QuestionStatus.BAD_OPTIONS, reason)
    if not isinstance(options, list) or not options or not all(isinstance(option, Mapping) for option in options):
        return RawQuestion(raw.text, options, raw.answer, raw.kind, also=raw.also)
    texts = [next((option[name] for name in _TEXTS if name in option), option) for option in options]
    labels = [next((option[name] for name in _LABELS if name in option), None) for option in options]
    if all(label is None for label in labels):
        return RawQuestion(raw.text, texts, raw.answer, raw.kind, also=raw.also)
    return _labelled(labels, texts, raw)


def _labelled(labels: Sequence[object], texts: Sequence[object], raw: RawQuestion) -> RawQuestion:
    """Options labelled A, B, C, ... or by numbers from 0 or 1; numeric answers are converted to letters."""
    names = sorted(
        ((_plain(label), position) for position, label in enumerate(labels)), key=lambda pair: (len(pair[0]), pair)
    )
    ordered = [texts[position] for _, position in names]
    while ordered and _blank(ordered[-1]):  # columns or Parquet fields used by other questions only
        ordered.pop()
    named = [name for name, _ in names[: len(ordered)]]
    count = len(ordered)
    answers = (raw.answer, *raw.also)
    by_number = any(isinstance(answer, (int, float)) and not isinstance(answer, bool) for answer in answers)
    if by_number and [position for _, position in names] != list(range(len(names))):
        reason = "the answer is an index, and the options' names are not in order; give it as text"
        return _refused(raw, ordered, QuestionStatus.BAD_ANSWER, reason)
    if count <= len(LETTERS) and named == list(LETTERS[:count]):
        return RawQuestion(raw.text, ordered, raw.answer, raw.kind, also=raw.also)
    if named not in ([str(number) for number in range(count)], [str(number + 1) for number in range(count)]):
        shown = ", ".join(map(str, labels))[:100]
        reason = f"options that are named {shown}, not A, B, C, ... or 1, 2, 3, ..."
        return _refused(raw, ordered, QuestionStatus.BAD_OPTIONS, reason)
    if "0" not in named and by_number:
        reason = "the answer is a number that may be an index from 0 or an option's name; give it as text"
        return _refused(raw, ordered, QuestionStatus.BAD_ANSWER, reason)
    first, *others = [_by_name(answer, named, ordered) for answer in answers]
    return RawQuestion(raw.text, ordered, first, raw.kind, also=tuple(others))


def _is_image(option: object) -> bool:
    return isinstance(option, str) and _IMAGE_MARK.fullmatch(option.strip()) is not None


def _refused(raw: RawQuestion, options: object, status: QuestionStatus, reason: str) -> RawQuestion:
    return RawQuestion(raw.text, options, raw.answer, raw.kind, (status, reason))


def _plain(label: object) -> str:
    return unicodedata.normalize("NFKC", str(label)).strip(" ().:").upper()


def _by_name(answer: object, names: Sequence[str], texts: Sequence[object]) -> object:
    """An answer that is one of ``names`` (numbers), as letter and text, which :func:`checked` reads unambiguously.

    If another option's text is that number, the letter gets that text, so that the check finds them to differ. Other
    answers are unchanged.
    """
    if not isinstance(answer, str) or _plain(answer) not in names:
        return answer
    position = names.index(_plain(answer))
    others = [number for number, text in enumerate(texts) if fold(str(text)) == fold(answer) and number != position]
    return f"{LETTERS[position]}. {texts[others[0] if others else position]}"


def _with_option_lines(text: str, raw: RawQuestion) -> RawQuestion:
    """Options from the end of the text. The question is everything before the last line labelled A."""
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


def _of_prompt(prompt: str) -> str:
    """The question in a prompt, with its options: without what VLMEvalKit and CapRL put before it."""
    head = _PROMPT_HEAD.match(prompt)
    return prompt if head is None else prompt[head.end() :]


def _about_the_image(text: str) -> str:
    """``text`` with MMMU's marks of the image removed at its ends, and named elsewhere; a question has one image."""
    marks = list(_IMAGE_MARK.finditer(text))
    for mark in reversed(marks):
        before, after = text[: mark.start()], text[mark.end() :]
        at_end = not _IMAGE_MARK.sub("", before).strip() or not _IMAGE_MARK.sub("", after).strip()
        text = f"{before}{after}".strip() if at_end else f"{before}the image{after}"
    return text


def _without_instructions(text: str) -> str:
    lines = text.splitlines()
    kept = _without_last(lines, _INSTRUCTION)
    return text if len(kept) == len(lines) else "\n".join(kept)


def _without_last(lines: list[str], pattern: re.Pattern[str]) -> list[str]:
    """``lines`` without trailing ones that match ``pattern``, and blank ones after those; never empty."""
    kept = lines
    while True:
        filled = [number for number, line in enumerate(kept) if line.strip()]
        if len(filled) < 2 or pattern.fullmatch(kept[filled[-1]].strip()) is None:
            return kept
        kept = kept[: filled[-2] + 1]
