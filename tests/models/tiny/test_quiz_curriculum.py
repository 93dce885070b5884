"""Lessons teach what is so: every expected answer is found again from the text of its branch and the scene alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest

from capipe.models.quiz import ABSTAIN, KINDS, LETTERS, Question, caption_prompt, image_prompt, writing_prompt
from capipe.models.tiny.train.quiz_models import READER_LEVELS, reads
from capipe.models.tiny.train.texts import quiz_curriculum
from capipe.models.tiny.train.texts.caption_augmentation import augmented_caption
from capipe.models.tiny.train.texts.quiz import PUBLIC_KIND, Asked, facts_of, possible, solve, understand
from capipe.models.tiny.train.texts.quiz_curriculum import (
    KNOWLEDGE,
    LIST,
    SPELL,
    WORDS_ONLY,
    Branch,
    QuizText,
    guessing,
    lettered,
    looking,
    lookup_question,
    reading,
    sample_different,
    writing,
    written,
)
from capipe.models.tiny.train.texts.yes_no_curriculum import asking, checking
from capipe.models.tiny.world.grade import Facts, parse
from capipe.models.tiny.world.scenes import MOST_THINGS, Scene, scenes, split_of
from capipe.models.yes_no import OPTIONS

from .presence_answers import answer as is_so

KNOWN = {text: right for text, right, _ in KNOWLEDGE}
Told = list[tuple[str, Facts]]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the captions of the lessons in a test told, in their order."""
    kept: Told = []

    def listen(scene: Scene, rng: Random) -> tuple[str, Facts]:
        kept.append(augmented_caption(scene, rng))
        return kept[-1]

    monkeypatch.setattr(quiz_curriculum, "augmented_caption", listen)
    return kept


def choices(branch: Branch) -> tuple[str, dict[str, str]]:
    """The question and its choices by letter, as whoever answers reads them."""
    first, *lines = branch.asked.removesuffix("\n").split("\n")
    assert first.startswith("Question: ") and branch.asked.endswith("\n")
    parts = [re.fullmatch(r"([A-J])\. (.+)", line) for line in lines]
    by_letter = {part[1]: part[2] for part in parts if part is not None}
    assert list(by_letter) == list(LETTERS[: len(lines)]) and 3 <= len(lines) <= 7
    assert len(set(by_letter.values())) == len(lines) and ABSTAIN in by_letter.values()
    return first.removeprefix("Question: "), by_letter


def given(branch: Branch) -> tuple[str, str, set[str] | None]:
    """The question, the answer in words, and what there was to choose from (None: anything)."""
    if branch.form == "words":
        question, *shown, line = branch.asked.removeprefix("Question: ").split("\n")
        assert line == WORDS_ONLY and all(re.match(r"[A-J]\. ", option) for option in shown)
        return question, branch.answer, None
    assert branch.form == "letter" and branch.answer in LETTERS
    question, by_letter = choices(branch)
    return question, by_letter[branch.answer], set(by_letter.values())


def right(answer: str | None, offered: set[str] | None) -> str:
    """What is to be answered where ``answer`` is known: to abstain if it is not offered."""
    return answer if answer is not None and (offered is None or answer in offered) else ABSTAIN


def many(make: Callable[[Random], QuizText], count: int) -> Iterator[QuizText]:
    for seed in range(count):
        yield make(Random(f"test:{seed}"))


def test_readers_are_to_answer_what_the_caption_tells(heard: Told) -> None:
    outcomes: Counter[str] = Counter()
    for lesson in many(reading, 200):
        caption, facts = heard.pop()
        if lesson.text != caption_prompt(caption):  # replaced by one that tells nothing
            assert lesson.text in [caption_prompt(None), caption_prompt(""), caption_prompt("An image.")]
            facts = Facts()
            outcomes["nothing told"] += 1
        assert lesson.scene is None and len(lesson.branches) == 8 and not heard
        for branch in lesson.branches:
            question, answer, offered = given(branch)
            asked = understand(question)
            assert asked is not None, question
            assert answer == right(solve(asked, facts), offered), (lesson.text, branch)
            outcomes[branch.form] += 1
            outcomes["abstain" if answer == ABSTAIN else "answer"] += 1
    assert 0.1 < outcomes["words"] / 1600 < 0.2 and outcomes["letter"] + outcomes["words"] == 1600
    assert 0.25 < outcomes["abstain"] / 1600 < 0.6
    assert 2 <= outcomes["nothing told"] <= 18


def test_who_looks_is_to_answer_what_is_to_be_seen() -> None:
    outcomes: Counter[str] = Counter()
    for lesson in many(looking, 200):
        assert lesson.text == image_prompt() and lesson.scene is not None
        assert split_of(lesson.scene) == "train"
        for branch in lesson.branches:
            question, answer, offered = given(branch)
            asked = understand(question)
            if asked is None and question in KNOWN:
                assert answer == KNOWN[question]
                outcomes["known"] += 1
                continue
            if asked is None:
                assert answer == OPTIONS[0 if is_so(question, lesson.scene) else 1], (lesson.scene, branch)
                outcomes[answer] += 1
                continue
            assert answer == right(solve(asked, facts_of(lesson.scene)), offered), (lesson.scene, branch)
            outcomes["abstain" if answer == ABSTAIN else "answer"] += 1
            outcomes["leaks"] += tells_its_answer(asked)
    assert outcomes["known"] > 10 and outcomes["leaks"] > 40
    assert min(outcomes[option] for option in OPTIONS) > 60
    assert 0.04 < outcomes["abstain"] / 1000 < 0.15


def tells_its_answer(asked: Asked) -> bool:
    return bool(asked.target is not None and getattr(asked.target, asked.kind))


def test_who_sees_nothing_is_to_answer_only_what_the_question_tells() -> None:
    outcomes: Counter[str] = Counter()
    for lesson in many(guessing, 250):
        assert lesson.text == image_prompt() and lesson.scene is None
        for branch in lesson.branches:
            question, answer, offered = given(branch)
            asked = understand(question)
            if asked is None and question in KNOWN:
                assert answer == KNOWN[question]
                outcomes["known"] += 1
                continue
            if asked is None:
                assert answer == ABSTAIN and set(OPTIONS) < offered, branch
                outcomes["abstain yes or no"] += 1
                continue
            said = getattr(asked.target, asked.kind) if tells_its_answer(asked) else None
            assert answer == (said or ABSTAIN), branch
            assert answer == ABSTAIN or (offered is not None and answer in question)
            outcomes["told" if said else f"abstain {asked.kind}"] += 1
    assert outcomes["known"] > 120 and outcomes["told"] > 190
    assert {kind for kind in outcomes if kind.startswith("abstain")} == {
        f"abstain {kind}"
        for kind in ("background", "color", "count", "place", "shape", "sign", "sign_place", "size", "yes or no")
    }


@pytest.mark.parametrize("make", [reading, looking, guessing])
def test_no_place_is_right_more_often(make: Callable[[Random], QuizText]) -> None:
    """Neither for an answer nor for abstaining; by the number of choices, since few have many."""
    counts: dict[int, Counter[str]] = {}
    abstained: Counter[str] = Counter()
    for lesson in many(make, 250):
        for branch in lesson.branches:
            if branch.form == "letter":
                by_letter = choices(branch)[1]
                counts.setdefault(len(by_letter), Counter())[branch.answer] += 1
                if len(by_letter) == 5:
                    abstained[next(letter for letter, choice in by_letter.items() if choice == ABSTAIN)] += 1
    assert set(counts) == {3, 4, 5, 6, 7}
    for number, letters in (*counts.items(), (5, abstained)):
        expected = letters.total() / number
        surprise = sum((letters[letter] - expected) ** 2 / expected for letter in LETTERS[:number])
        assert surprise < 30, letters  # chi squared of at most 6 degrees: above this once in 25,000 times


def test_to_abstain_is_right_where_the_answer_is_not_offered() -> None:
    question = Question("What color is the star?", ("red", "blue"), 0)
    for answer, expected in (("blue", "blue"), ("pink", ABSTAIN), (None, ABSTAIN)):
        drawn = [lettered(question, answer, Random(seed)) for seed in range(40)]
        assert {given(branch)[1] for branch in drawn} == {expected}
        assert {branch.answer for branch in drawn} == {"A", "B", "C"}


def test_questions_are_written_as_json_and_true() -> None:
    rng = Random(0)
    for scene in scenes("train", 120, seed=40):
        count = rng.randint(1, 6)
        text = written(scene, count, rng)
        parsed = json.loads(text)
        assert list(parsed) == ["questions"] and len(parsed["questions"]) == count
        for entry in parsed["questions"]:
            assert list(entry) == ["kind", "question", "options", "answer"]
            asked = understand(entry["question"])
            assert asked is not None and asked in possible(scene)
            assert entry["options"].count(entry["answer"]) == 1 and 2 <= len(entry["options"]) <= 6
            assert entry["answer"] == solve(asked, facts_of(scene))
            assert entry["kind"] == PUBLIC_KIND.get(asked.kind, asked.kind) and entry["kind"] in KINDS
        assert len({entry["question"] for entry in parsed["questions"]}) == count


def test_a_writing_lesson_asks_for_as_many_questions_as_it_shows() -> None:
    counts: Counter[int] = Counter()
    for lesson in many(writing, 120):
        (branch,) = lesson.branches
        assert lesson.text == "" and lesson.scene is not None and branch.form == "text"
        number = len(json.loads(branch.answer)["questions"])
        assert branch.asked == writing_prompt(number)
        counts[number] += 1
    assert set(counts) == {1, 2, 3, 4, 5, 6}


def test_questions_are_of_other_kinds_as_long_as_there_are_such() -> None:
    rng = Random(0)
    firsts: Counter[str] = Counter()
    for scene in scenes("train", 120, seed=41):
        chosen = sample_different(scene, 6, rng)
        kinds = {asked.kind for asked in possible(scene)}
        assert len(set(chosen)) == 6 and len({asked.kind for asked in chosen}) == min(6, len(kinds))
        firsts[chosen[0].kind] += 1
        everything = sample_different(scene, 1000, rng)
        assert sorted(everything, key=repr) == sorted(possible(scene), key=repr)
    assert len(firsts) == 8


def test_lessons_are_the_same_for_the_same_seed() -> None:
    for make in (reading, looking, guessing, writing, asking, checking):
        assert make(Random(7)) == make(Random(7)) != make(Random(8))


def test_whoever_begins_to_read_lists_and_finds_things_in_captions_that_tell_all() -> None:
    rng = Random(6)
    for _ in range(40):
        lesson = lookup_question(rng, most=3, plainly=True, in_words=0.5, questions=4, lists=2)
        caption = lesson.text.split("<caption>\n")[1].split("\n</caption>")[0]
        facts = parse(caption)
        assert 2 <= len(facts.things) <= 3 and all(t.color and t.size and t.place for t in facts.things)
        assert [branch.asked for branch in lesson.branches[:2]] == [LIST, LIST] and len(lesson.branches) == 6
        for branch in lesson.branches[:2]:
            listed = [sorted(entry.split()) for entry in branch.answer.split(", ")]
            assert branch.form == "text" and branch.answer.startswith(" ")
            things = [sorted(f"{t.shape} {t.color} {t.size} {t.place}".split()) for t in facts.things]
            assert sorted(listed) == sorted(things)
        for branch in lesson.branches[2:]:
            assert branch.form in ("words", "letter") and branch.answer not in (ABSTAIN, "")


def test_whoever_learns_letters_says_those_of_all_options() -> None:
    rng = Random(8)
    for _ in range(30):
        branch = lookup_question(rng, questions=0, letters=1).branches[0]
        _, by_letter = choices(replace(branch, asked=branch.asked.removesuffix(SPELL)))
        written = dict(reversed(entry.rsplit(" ", 1)) for entry in branch.answer.strip().split(", "))
        assert branch.form == "text" and written == by_letter


def test_the_levels_of_a_reader_lead_from_lists_to_captions_that_leave_things_out() -> None:
    def forms(level: int) -> Counter[str]:
        return Counter(branch.form for n in range(30) for branch in reads(Random(n), level).branches)

    first, second, *letters, last = (forms(level) for level in range(1, READER_LEVELS + 1))
    assert set(first) == {"text", "words"} and set(second) == {"text", "words", "letter"}
    assert len(letters) == MOST_THINGS and all(set(each) == {"text", "words", "letter"} for each in letters)
    assert set(last) == {"words", "letter"} and last["letter"] > 3 * last["words"]
    answers = [branch.answer for n in range(30) for branch in reads(Random(n), READER_LEVELS).branches]
    assert ABSTAIN in answers


def test_letters_are_first_learnt_about_one_thing() -> None:
    """Of the level's lessons with letters; those in words alone keep what was learnt about many."""

    def things(level: int) -> Counter[int]:
        drawn = (reads(Random(n), level) for n in range(60))
        return Counter(
            len(parse(lesson.text.split("<caption>")[1]).things)
            for lesson in drawn
            if any(branch.form == "letter" for branch in lesson.branches)
        )

    assert set(things(3)) == {1} and set(things(4)) == {2} and max(things(READER_LEVELS - 1)) == MOST_THINGS


def test_a_letter_is_given_with_what_it_means() -> None:
    for number in range(40):
        for branch in reading(Random(number)).branches:
            if branch.form != "letter":
                assert branch.means == ""
                continue
            _, by_letter = choices(branch)
            assert by_letter[branch.answer] == branch.means
