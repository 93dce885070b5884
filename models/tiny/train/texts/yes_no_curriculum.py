"""Training data of the teacher: yes-or-no questions and statements about an image, in the prompts of `yes_no`.

Half of the statements are false, most of them by one attribute: a true sentence and its false twin stand beside each
other under the same image.
"""

from __future__ import annotations

from itertools import takewhile
from random import Random

from ....quiz import LETTERS, one_line
from ....scorers.sentences import split_sentences
from ....yes_no import ASK, CHECK, OPTIONS, ORDERS, put_question
from ...world.captions import dense_caption
from ...world.scenes import MOST_THINGS, Scene, sample_of
from .caption_augmentation import retold
from .hard_negatives import addition, holds, sentence_pair
from .presence import sample_presence
from .quiz_curriculum import WORDS_ONLY, Branch, QuizText, Statement

IN_WORDS = 0.2  # share of answers in words: what is so is learnt before its letter
PAIRED, STRAY = 0.6, 0.85  # cumulative shares: a sentence and its twin; one of the scene's and one of another's
CHECKED = CHECK.partition("{text}")[0]
PHRASES = (ASK, f"Question: {CHECKED}", "Question: Is there", *(f". {option}\n" for option in OPTIONS))


def asking(rng: Random, most: int = MOST_THINGS, questions: int = 10) -> QuizText:
    """An image and yes-or-no questions about what it shows or does not show."""
    scene = sample_of("train", rng, most, 0.5)
    asked = [sample_presence(scene, rng) for _ in range(questions)]
    return QuizText(ASK, tuple(yes_no_branch(each.text, each.holds, rng) for each in asked), scene)


def checking(rng: Random, most: int = MOST_THINGS, twins: int = 4) -> QuizText:
    """An image and statements, true and false ones in turn."""
    scene = sample_of("train", rng, most, 0.5)
    branches = tuple(branch for _ in range(twins) for branch in _checked(scene, rng, most))
    return QuizText(ASK, branches, scene)


def _checked(scene: Scene, rng: Random, most: int) -> tuple[Branch, Branch]:
    draw = rng.random()
    if draw < PAIRED:
        true, false = sentence_pair(scene, rng)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(true, false, strict=False)))
        return statement_branch(true, True, rng, len(true)), statement_branch(false, False, rng, common)
    if draw < STRAY:
        true = rng.choice(split_sentences(dense_caption(scene, rng)))
        other = rng.choice(split_sentences(dense_caption(sample_of("train", rng, most, 0.5), rng)))
        return statement_branch(true, True, rng, len(true)), statement_branch(other, holds(scene, other), rng)
    true = rng.choice(split_sentences(retold(scene, rng)))
    return statement_branch(true, True, rng, len(true)), statement_branch(addition(scene, rng), False, rng)


def statement_branch(sentence: str, true: bool, rng: Random, true_until: int | None = None) -> Branch:
    """A sentence to be checked; ``true_until``: its number of characters after which it is false, None: not known."""
    text = one_line(sentence)
    assert len(text) == len(sentence), "the places of its words would not be known"
    branch = yes_no_branch(CHECK.format(text=text), true, rng)
    if true_until is None:
        return branch
    start = branch.asked.index(CHECKED) + len(CHECKED)
    statement = Statement(start, start + true_until, start + len(text))
    return Branch(branch.asked, branch.answer, branch.form, branch.means, statement)


def yes_no_branch(question: str, holds: bool, rng: Random) -> Branch:
    """A question in either order of its two options, or to be answered in words."""
    option = 0 if holds else 1
    if rng.random() < IN_WORDS:
        return Branch(f"Question: {one_line(question)}\n{WORDS_ONLY}", OPTIONS[option], "words")
    order = rng.choice(ORDERS)
    return Branch(put_question(question, order), LETTERS[order.index(option)], means=OPTIONS[option])
