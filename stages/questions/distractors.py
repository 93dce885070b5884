"""Conversion of open-ended questions to multiple choice: distractors are other answers to the same question.

Pure: the options depend on the seed, the image, the question and the set's answers, not on the order of records.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

from ...manifests.status import QuestionStatus
from ...models.quiz import LETTERS, MOST_OPTIONS, fold
from .import_sets import QuestionRecord
from .validate import MAX_CHARS, RawQuestion, abstains

MOST_WORDS = 5  # of an answer: a long one would stand out among short ones by its length
_ARTICLES = ("a", "an", "the")
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty"
)
_SAME_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {
    "none": "0",
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "leaves": "leaf",
    "knives": "knife",
    "shelves": "shelf",
    "wolves": "wolf",
}


@dataclass(frozen=True, slots=True)
class _Answers:
    """``spoken``: answers by group and form. ``right``: forms of all answers to a question about an image."""

    spoken: dict[str, dict[str, str]]
    right: dict[tuple[tuple[str, ...], str], set[str]]


def close_sets(
    records: Iterable[QuestionRecord], *, seed: int = 0, fewest: int = 4, distractors: int = 3
) -> list[QuestionRecord]:
    """Add options to the questions that have an answer but no options. Everything else is unchanged.

    Questions form a group if they have the same kind, or no kind and the same text after ``fold``. Wrong options are
    ``distractors`` answers of the group that are not variants of the right one or of any other answer to this question
    about this image. If the group has fewer than ``fewest`` different answers, or too few of them are left, or the
    answer has over MOST_WORDS words, the question gets a fault: bad_options. All records are held in memory.
    Raises ValueError if that many distractors do not fit beside the right option.
    """
    if not 1 <= distractors < MOST_OPTIONS:
        raise ValueError(f"{distractors} distractors, not 1 to {MOST_OPTIONS - 1}")
    held = list(records)
    answers = _collect(held)

    def closed(record: QuestionRecord, entry: RawQuestion) -> RawQuestion:
        answer = _open_answer(entry)
        if answer is None:
            return entry
        fault = _unfit(answer)
        known = answers.spoken.get(_group(entry), {})
        others = sorted(known.keys() - answers.right[_place(record, entry)]) if fault is None else []
        if fault is None and len(known) < fewest:
            fault = QuestionStatus.BAD_OPTIONS, f"its group has {len(known)} different answers, fewer than {fewest}"
        if fault is None and len(others) < distractors:
            fault = QuestionStatus.BAD_OPTIONS, f"its group has {len(others)} wrong answers, fewer than {distractors}"
        if fault is not None:
            return replace(entry, fault=fault)
        rng = Random(repr((seed, *_place(record, entry), answer_form(answer))))
        options = [answer, *(known[form] for form in rng.sample(others, distractors))]
        rng.shuffle(options)
        # as letter and text: either alone is ambiguous if the answers are letters or numbers
        return replace(entry, options=options, answer=f"{LETTERS[options.index(answer)]}. {answer}")

    return [replace(record, questions=tuple(closed(record, entry) for entry in record.questions)) for record in held]


def answer_form(answer: str) -> str:
    """Normalised form of an answer: "Two dogs.", "2 dog" and "the two dogs" have the same one.

    Endings in s, es and e are cut, which merges a few words too many: that loses a distractor, never a right option.
    """
    words = fold(answer).replace(",", "").split()
    words = words[1:] if len(words) > 1 and words[0] in _ARTICLES else words
    return " ".join(_stem(_SAME_WORDS.get(word, word)) for word in words)


def _stem(word: str) -> str:
    stem = word.rstrip("es")
    return word if not stem else stem[:-1] + "i" if len(stem) > 1 and stem.endswith("y") else stem


def _collect(records: Iterable[QuestionRecord]) -> _Answers:
    """Collect answers by group and form; the most common spelling represents a form, alphabetically first for ties."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    right: dict[tuple[tuple[str, ...], str], set[str]] = defaultdict(set)
    for record, entry, answer in _open_questions(records):
        counts[_group(entry)][answer_form(answer)][answer] += 1
        right[_place(record, entry)].add(answer_form(answer))

    def commonest(of: Counter[str]) -> str:
        return min(of, key=lambda text: (-of[text], text))

    return _Answers({g: {form: commonest(of) for form, of in forms.items()} for g, forms in counts.items()}, right)


def _open_questions(records: Iterable[QuestionRecord]) -> Iterator[tuple[QuestionRecord, RawQuestion, str]]:
    for record in records:
        for entry in record.questions:
            answer = _open_answer(entry)
            if answer is not None and _unfit(answer) is None:
                yield record, entry, answer


def _open_answer(entry: RawQuestion) -> str | None:
    """Answer of a question without options; None for other questions, and if there is no answer."""
    if entry.fault is not None or entry.options not in (None, [], "") or not isinstance(entry.text, str):
        return None
    answer = str(entry.answer) if type(entry.answer) is int else entry.answer  # without options it is not an index
    return " ".join(answer.split()) or None if isinstance(answer, str) and len(answer) <= MAX_CHARS else None


def _unfit(answer: str) -> tuple[QuestionStatus, str] | None:
    if abstains(answer):
        return QuestionStatus.BAD_ANSWER, "the answer is to abstain"
    words = len(answer.split())
    if words > MOST_WORDS:
        return QuestionStatus.BAD_OPTIONS, f"no options, and the answer has {words} words, over {MOST_WORDS}"
    return None


def _group(entry: RawQuestion) -> str:
    if isinstance(entry.kind, str) and entry.kind.strip():
        return f"kind {fold(entry.kind[:MAX_CHARS])}"
    return f"text {fold(str(entry.text))}"


def _place(record: QuestionRecord, entry: RawQuestion) -> tuple[tuple[str, ...], str]:
    return record.images, fold(str(entry.text))
