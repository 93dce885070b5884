"""Validation of multiple-choice questions: one strict parser for generated and imported ones.

Pure, and never raises: any fault of an entry becomes its status and reason.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Any

from ...manifests.status import QuestionStatus
from ...models.quiz import ABSENT, ABSTAIN, FEWEST_OPTIONS, KINDS, LETTERS, MOST_OPTIONS, Question, fold

MAX_CHARS = 2_000  # of a question or an option; longer ones are refused, and stored truncated

_SYNONYMS = {
    "objects": "object",
    "colors": "color",
    "colour": "color",
    "colours": "color",
    "shapes": "shape",
    "texture": "material",
    "location": "position",
    "spatial": "position",
    "spatial relation": "position",
    "relation": "position",
    "place": "position",
    "number": "count",
    "counting": "count",
    "quantity": "count",
    "ocr": "text",
    "scene": "background",
    "activity": "action",
    "actions": "action",
}

_ONE = "[A-Ka-kＡ-Ｋａ-ｋ]"  # a letter; full-width ones are common in Chinese and Japanese

# "A) red", "B. blue", "- (C) green", "d：黄"; not "A.M.", which is an abbreviation.
_LABELLED = re.compile(
    rf"[-*•]?\s*[(（]?(?P<label>{_ONE})\s*(?P<end>[)）]|[.．:：、](?!\w\.))\s*(?P<rest>.*)", re.DOTALL
)
_LETTER = re.compile(
    r"[\s*(（\[]*(?i:(?:the )?(?:correct |right )?(?:answer|option|choice)(?: is)?[\s:*(]*)?"
    rf"(?P<letter>{_ONE})[\s*.):．）：\]]*"  # not with IGNORECASE, which matches a dotted capital I as an i
)

_WHY = r"(?: (?:this|that|it|(?:this|the) question))?(?: (?:based on|from|given|with|without|by) .{0,80})?"
_ABSTAIN = re.compile(
    r"(?:it |this |that |i |we |one |there is |the answer )?"
    r"(?:(?:can ?not|can't|could not|couldn't)"
    r" (?:be (?:told|known|answered|determined|inferred)|tell|say|know|answer|determine|infer)"
    rf"|(?:is )?(?:unable|impossible|not possible) to (?:tell|say|know|answer|determine|infer)){_WHY}"
    r"|(?:there is |there's )?(?:not enough|insufficient) (?:information|info|data|context|details?)(?: .{0,80})?"
    r"|i? ?(?:do not|don't) know"
)

_MANY = r"\b(?:all|none|both|either|neither|any|some|one|two|most|each|every)"
_OTHERS = [
    # "all of the above", "none of the following options", "both above are right"; not "all above the door"
    rf"{_MANY}(?: of)?(?: the)? (?:above|preceding|previous|following)"
    r"(?:$| (?:options|choices|answers|is|are|apply|applies)\b)",
    rf"{_MANY}(?: of)?(?: the| these| those)?(?: \w+)? (?:options?|choices?|answers?)\b",
    rf"^{_MANY} of (?:these|those|them|the others?)(?:$| (?:is|are|apply|applies)\b)",
    r"\b(?:above|preceding|previous|following|other|first two|last two) (?:options?|choices?|answers?)\b",
]
_SAYS_OTHERS = re.compile("|".join(_OTHERS), re.IGNORECASE)


@dataclass(frozen=True)
class RawQuestion:
    """A question as read, with unchecked types.

    ``answer``: the right option's text, its letter or label ("B", "B)", "B. blue"), a bool (yes or true, no or false),
    or an int: its index from 0. ``also``: answers from other fields, which must name the same option.
    """

    text: object
    options: object
    answer: object
    kind: object = None
    fault: tuple[QuestionStatus, str] | None = None  # fault found before validation
    also: tuple[object, ...] = ()


class _Bad(Exception):
    def __init__(self, status: QuestionStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def checked(entry: RawQuestion, seen: set[str], most: int = MOST_OPTIONS) -> dict[str, Any]:
    """``entry`` as a dict of QUESTION_FIELDS with its status and, unless that is ok, a short reason. Never raises.

    Labels are stripped if all options have them in order; options to abstain are dropped, as every presentation adds
    one. ``seen``: folded texts of the ok questions about the same image; an ok one is added to it. ``most``: maximum
    number of options, not counting those to abstain.
    """
    kind = kind_of(entry.kind)
    text = _clean(entry.text) if isinstance(entry.text, str) else None
    options: list[str] = []
    try:
        if entry.fault is not None:
            raise _Bad(*entry.fault)
        _check_text(text)
        options = _without_labels(_option_texts(entry.options))
        kept = _kept_options(options)
        question = _question(text or "", [options[index] for index in kept], kind, most)
        if isinstance(entry.options, list) and any(isinstance(option, bool) for option in entry.options):
            _refuse_number(entry.answer)
        right_index = _answer_place(entry.answer, options)
        if any(_answer_place(other, options) != right_index for other in entry.also):
            raise _Bad(QuestionStatus.BAD_ANSWER, "several fields have answers, and they are not the same option")
        if right_index not in kept:
            raise _Bad(QuestionStatus.BAD_ANSWER, "the answer is to abstain")
        question = replace(question, answer=kept.index(right_index))
    except _Bad as bad:
        cut = [option[:MAX_CHARS] for option in options]
        return _fields(None, kind, text and text[:MAX_CHARS], cut, None, bad.status, str(bad)[:300])
    values = question.id, kind, question.text, list(question.options), question.answer
    if fold(question.text) in seen:
        return _fields(*values, QuestionStatus.DUPLICATE, "asked before about the same image")
    seen.add(fold(question.text))
    return _fields(*values, QuestionStatus.OK, None)


def kind_of(kind: object) -> str:
    """One of ``quiz.KINDS`` or ``ABSENT``, synonyms resolved; "other" for anything else."""
    if not isinstance(kind, str) or len(kind) > MAX_CHARS:
        return "other"
    word = " ".join(re.split(r"[\s_-]+", kind.strip().lower()))
    word = _SYNONYMS.get(word, word)
    return word if word in (*KINDS, ABSENT) else "other"


def abstains(option: str) -> bool:
    """True for an option to abstain: capipe's own text, or similar to "Can not answer based on the caption"."""
    folded = fold(option).replace("’", "'")
    return folded == fold(ABSTAIN) or _ABSTAIN.fullmatch(folded) is not None


def refers_to_others(option: str, choices: int) -> bool:
    """True if an option refers to others of ``choices`` by letter or position, and so is invalid once shuffled."""
    plain = re.sub(r"[\s\"'“”‘’().]+", " ", option).strip()
    letter = f"[A-{LETTERS[choices - 1]}]"
    several = rf"{letter}(?:(?: ?, ?| ?, ?(?:and|or|nor) | (?:and|or|nor|&) ){letter})+"
    return (
        _SAYS_OTHERS.search(plain) is not None
        or re.fullmatch(rf"(?:only |both |either |neither |not )?{several}(?: only)?", plain, re.IGNORECASE) is not None
        or re.search(rf"\b(?i:both|either|neither) {letter} (?i:and|or|nor) {letter}\b", plain) is not None
        or re.search(rf"\b(?i:options?|choices?|answers?) (?:{letter}\b|(?i:{several})$)", plain) is not None
        or re.fullmatch(rf"(?i:.*\b(?:except|but)|only|not|just) {letter}|{letter} only", plain) is not None
    )


# --- the question and its options ------------------------------------------------------------------------------------


def _check_text(text: str | None) -> None:
    if not text:
        raise _Bad(QuestionStatus.MALFORMED, "no question: it is empty or no text")
    if len(text) > MAX_CHARS:
        raise _Bad(QuestionStatus.MALFORMED, f"the question has {len(text)} characters, over {MAX_CHARS}")


def _option_texts(options: object) -> list[str]:
    if not isinstance(options, (list, tuple)):
        what = "there are no options" if options is None else f"options of type {type(options).__name__}, not a list"
        raise _Bad(QuestionStatus.BAD_OPTIONS, what)
    if len(options) > len(LETTERS):
        raise _Bad(QuestionStatus.BAD_OPTIONS, f"{len(options)} options, not {FEWEST_OPTIONS} to {MOST_OPTIONS}")
    for option in options:
        if not isinstance(option, (str, int)) and not (isinstance(option, float) and math.isfinite(option)):
            raise _Bad(QuestionStatus.BAD_OPTIONS, f"an option of type {type(option).__name__}, not a text")
    return [_clean(option if isinstance(option, str) else _number_text(option)) for option in options]


def _number_text(number: float) -> str:
    """A number as text; Parquet may have converted ints to floats. A bool is "True" or "False"."""
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _without_labels(options: list[str]) -> list[str]:
    """Options without "A)", "B)", ... if all have them in order; else unchanged: "A" may be a whole option."""
    matches = [_LABELLED.fullmatch(option) for option in options]
    labels = [_letter(match["label"]) if match else "" for match in matches]
    rests = [match["rest"] if match else "" for match in matches]
    return rests if labels == list(LETTERS[: len(options)]) and any(rests) else options


def _kept_options(options: list[str]) -> list[int]:
    """Check each option; returns the indices of those that do not abstain."""
    for option in options:
        if len(option) > MAX_CHARS:
            raise _Bad(QuestionStatus.BAD_OPTIONS, f"an option has {len(option)} characters, over {MAX_CHARS}")
        if (label := _LABELLED.fullmatch(option)) and label["end"] in ")）":
            reason = f"labels that are not A, B, C, ... in this order and on every option: {option!r}"
            raise _Bad(QuestionStatus.BAD_OPTIONS, reason)
        if refers_to_others(option, len(options)):
            raise _Bad(QuestionStatus.BAD_OPTIONS, f"an option speaks of others: {option!r}")
    return [index for index, option in enumerate(options) if not abstains(option)]


def _question(text: str, options: list[str], kind: str, most: int) -> Question:
    """Question with the first option as preliminary answer. Raises _Bad for options that Question refuses."""
    if len(options) > most:
        raise _Bad(QuestionStatus.BAD_OPTIONS, f"{len(options)} options, not {FEWEST_OPTIONS} to {most}")
    try:
        return Question(text, tuple(options), 0, kind)
    except ValueError as error:
        raise _Bad(QuestionStatus.BAD_OPTIONS, str(error)) from None


# --- the answer ------------------------------------------------------------------------------------------------------


def _answer_place(answer: object, options: list[str]) -> int:
    """Index among ``options``, including those to abstain, that every reading of the answer agrees on."""
    if isinstance(answer, float) and math.isfinite(answer):  # pandas converts indices to floats if one is missing
        answer = int(answer) if answer.is_integer() else str(answer)
    if isinstance(answer, bool):
        said = ("yes", "true") if answer else ("no", "false")
        return _agreed({index for word in said for index in _places_of(word, options)}, str(answer))
    if isinstance(answer, int):
        return _agreed(_places_by_number(answer, options), str(answer))
    if not isinstance(answer, str):
        what = "no answer" if answer is None else f"an answer of type {type(answer).__name__}, not text or an index"
        raise _Bad(QuestionStatus.BAD_ANSWER, what)
    text = _clean(answer)
    if not text:
        raise _Bad(QuestionStatus.BAD_ANSWER, "no answer")
    if len(text) > MAX_CHARS:
        raise _Bad(QuestionStatus.BAD_ANSWER, f"the answer has {len(text)} characters, over {MAX_CHARS}")
    return _agreed(_readings(text, options), text)


def _refuse_number(answer: object) -> None:
    """Refuse numeric answers if options are booleans: 1 may be an index or mean true."""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        raise _Bad(QuestionStatus.BAD_ANSWER, f"the answer {answer!r} is ambiguous: an index, or true or false")


def _places_by_number(number: int, options: list[str]) -> set[int]:
    """Candidate indices for a number: from 0, and the option with this number; also from 1, if it is the last."""
    named = {*_places_of(str(number), options), *_places_of(f"{number}.0", options)}
    if 0 <= number < len(options):
        return {number, *named}
    if not named:
        raise _Bad(QuestionStatus.BAD_ANSWER, "the answer is an index outside of the options (from 0)")
    return {number - 1, *named} if number == len(options) else named


def _readings(text: str, options: list[str]) -> set[int]:
    """Candidate indices for a text: as an option's text, as a letter, or as a letter with its option's text."""
    places = set(_places_of(text, options))
    if (letter := _LETTER.fullmatch(text)) is not None:
        return places | _places_by_letter(_letter(letter["letter"]), options)
    labelled = _LABELLED.fullmatch(text)
    if labelled is not None and not places:
        named = _places_of(labelled["rest"], options)
        label = LETTERS.index(_letter(labelled["label"]))
        return {label, *named} if named and label < len(options) else set()
    return places


def _places_by_letter(letter: str, options: list[str]) -> set[int]:
    """Candidate indices for a letter: by position, and by labels that were not stripped."""
    labels = [(_letter(label["label"]) if label else "") for label in map(_LABELLED.fullmatch, options)]
    counted = LETTERS.index(letter)
    own = {index for index, label in enumerate(labels) if label == letter}
    return own | ({counted} if counted < len(options) else set())


def _letter(label: str) -> str:
    return unicodedata.normalize("NFKC", label).upper()


def _places_of(text: str, options: list[str]) -> list[int]:
    folded = fold(text)
    return [index for index, option in enumerate(options) if fold(option) == folded]


def _agreed(places: set[int], answer: str) -> int:
    if len(places) > 1:
        letters = " or ".join(LETTERS[index] for index in sorted(places))
        reason = f"the answer {answer[:100]!r} is ambiguous: as a letter or index and as a text it names {letters}"
        raise _Bad(QuestionStatus.BAD_ANSWER, reason)
    if not places:
        reason = (
            "the answer is to abstain" if abstains(answer) else f"the answer {answer[:100]!r} is none of the options"
        )
        raise _Bad(QuestionStatus.BAD_ANSWER, reason)
    return places.pop()


def _clean(text: str) -> str:
    """Text stripped and made valid for UTF-8: JSON may have unpaired surrogates."""
    return text.strip().encode("utf-8", "replace").decode()


def _fields(
    id: str | None,
    kind: str,
    question: str | None,
    options: list[str],
    answer: int | None,
    status: QuestionStatus,
    error: str | None,
) -> dict[str, Any]:
    return {
        "id": id,
        "kind": kind,
        "question": question,
        "options": options,
        "answer": answer,
        "status": str(status),
        "error": error,
    }
