"""The teacher is taught yes and no in the very prompts in which it is asked, and what is so."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

from capipe.models.quiz import LETTERS
from capipe.models.tiny.train.quiz_models import TEACHER_LEVELS, teaches
from capipe.models.tiny.train.texts.hard_negatives import holds
from capipe.models.tiny.train.texts.quiz_curriculum import WORDS_ONLY, Branch, QuizText
from capipe.models.tiny.train.texts.yes_no_curriculum import CHECKED, asking, checking, statement_branch
from capipe.models.tiny.world.grade import grade
from capipe.models.tiny.world.scenes import split_of
from capipe.models.yes_no import ASK, CHECK, OPTIONS, ORDERS, prompt_of

from ...scripted import IMAGE
from .presence_answers import answer


def told(lesson: QuizText, branch: Branch) -> tuple[str, bool, str]:
    """The question, whether the answer is yes, and the order of the options, or "words"."""
    assert lesson.text == ASK
    if branch.form == "words":
        question, line = branch.asked.removeprefix("Question: ").split("\n")
        assert line == WORDS_ONLY and branch.answer in OPTIONS and not branch.means
        return question, branch.answer == OPTIONS[0], "words"
    question = branch.asked.partition("\n")[0].removeprefix("Question: ")
    prompts = {prompt_of(IMAGE, question, order).text: order for order in ORDERS}
    order = prompts[lesson.text + branch.asked]
    option = OPTIONS[order[LETTERS.index(branch.answer)]]
    assert option == branch.means
    return question, option == OPTIONS[0], str(order)


def test_questions_are_asked_as_the_reader_asks_them_and_answered_truly() -> None:
    forms: Counter[str] = Counter()
    answers: Counter[tuple[bool, str]] = Counter()
    for seed in range(100):
        lesson = asking(Random(seed))
        assert lesson.scene is not None and split_of(lesson.scene) == "train" and len(lesson.branches) == 10
        for branch in lesson.branches:
            question, yes, form = told(lesson, branch)
            assert yes is answer(question, lesson.scene), (question, lesson.scene)
            forms[form] += 1
            answers[yes, branch.answer] += 1
    assert 0.12 < forms["words"] / 1000 < 0.28 and min(forms[str(order)] for order in ORDERS) > 340
    assert max(answers[yes, letter] for yes in (True, False) for letter in "AB") < 290, "no letter is right more often"


def test_statements_are_true_and_false_in_turn() -> None:
    checked: Counter[bool] = Counter()
    known = 0
    for seed in range(100):
        lesson = checking(Random(seed))
        assert lesson.scene is not None and len(lesson.branches) == 8
        for number, branch in enumerate(lesson.branches):
            question, yes, _ = told(lesson, branch)
            sentence = question.removeprefix(CHECKED)
            assert question == CHECK.format(text=sentence)
            if yes:
                assert holds(lesson.scene, sentence), (sentence, lesson.scene)
            elif re.search(r"\b(in|at) the|background", sentence) and grade(lesson.scene, sentence).stated:
                known += not holds(lesson.scene, sentence)
            assert number % 2 == 1 or yes
            checked[yes] += 1
    assert 0.45 < checked[False] / 800 <= 0.5
    assert known > 0.6 * checked[False], "the grader reads the captioner's wordings alone"


def test_a_statement_is_marked_up_to_where_it_turns_false() -> None:
    marked = 0
    for seed in range(60):
        branches = checking(Random(seed)).branches
        for true, false in zip(branches[::2], branches[1::2], strict=True):
            assert true.statement is not None
            start, until, end = true.statement
            assert until == end and true.asked[:start].endswith(CHECKED) and true.asked[end] == "\n"
            if false.statement is None:
                continue
            marked += 1
            begin, wrong, stop = false.statement
            text, twin = true.asked[start:end], false.asked[begin:stop]
            same = wrong - begin
            assert text[:same] == twin[:same] and text[same] != twin[same] and false.asked[stop] == "\n"
    assert marked > 100
    assert statement_branch("A star.", False, Random(0)).statement is None


def test_the_teachers_last_lessons_are_of_every_sort_and_guide_along_yes_and_no_alone() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(300):
        lesson = teaches(Random(seed), TEACHER_LEVELS)
        yes_no = lesson.text == ASK
        checks = yes_no and any(CHECKED in branch.asked for branch in lesson.branches)
        form = "text" if lesson.branches[0].form == "text" else "seen" if lesson.scene else "unseen"
        kinds["checks" if checks else "asks" if yes_no else form] += 1
        assert yes_no or not any(branch.means or branch.statement for branch in lesson.branches)
    assert set(kinds) == {"checks", "asks", "text", "seen", "unseen"} and min(kinds.values()) > 8
    first = [teaches(Random(seed), 1) for seed in range(60)]
    assert {len(lesson.scene.things) for lesson in first if lesson.scene} == {1}, "of one thing first"
    assert any(lesson.text == ASK for lesson in first)
