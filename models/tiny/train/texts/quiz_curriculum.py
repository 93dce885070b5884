"""Training data of the readers and the teacher: a shared prefix, then several questions.

A :class:`QuizText` is a shared prefix (a caption in its instructions, or an image) and branches that each attend to the
prefix and themselves only: exactly an engine's computation for each of them, at a fraction of the cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

from ....quiz import ABSTAIN, LETTERS, Question, caption_prompt, image_prompt, put, writing_prompt
from ....yes_no import OPTIONS
from ...world.captions import PLAIN, dense_caption
from ...world.grade import Facts
from ...world.prompts import DENSE
from ...world.scenes import COLORS, MOST_THINGS, Scene, sample_of
from .caption_augmentation import augmented_caption, retold
from .presence import Presence, sample_presence
from .quiz import COUNTS, KINDS, Asked, facts_of, leaking, possible, quiz, sample_asked, solve

Form = Literal["letter", "words", "text"]
FORMS: tuple[Form, ...] = ("letter", "words", "text")
WORDS_ONLY = "Answer in words."
LIST = "List all things."
SPELL = "Say the letters."
BOUND = ("color", "place", "shape", "size")  # kinds that need one thing found among others: the most to learn
PRESENCE_SHARE = 0.15  # of the teacher's questions: whether something is there, beside a third option to abstain
KNOWLEDGE = (  # answerable without an image
    ("How many sides does a triangle have?", "three", COUNTS),
    ("How many corners does a square have?", "four", COUNTS),
    ("How many points does a star with five points have?", "five", COUNTS),
    (
        "Which color do you get from mixing red and yellow?",
        "orange",
        COLORS,
    ),
    ("Which of these is no color?", "circle", ("circle", "red", "blue", "green", "yellow")),
    ("Which of these is a shape?", "square", ("square", "pink", "large", "red")),
)


class Statement(NamedTuple):
    """Characters ``start`` to ``end`` of a question are a statement, which is false from ``false_from`` on."""

    start: int
    false_from: int
    end: int


@dataclass(frozen=True)
class Branch:
    """``asked`` continues the user's turn, ``answer`` is the assistant's; ``means``: a letter's answer in words.

    ``statement``: where the question quotes one whose words are known to be true or false.
    """

    asked: str
    answer: str
    form: Form = "letter"
    means: str = ""
    statement: Statement | None = None


@dataclass(frozen=True)
class QuizText:
    """A shared prefix and its branches; ``scene``: rendered as an image before the text, None for text only."""

    text: str
    branches: tuple[Branch, ...]
    scene: Scene | None = None


# --- readers ---------------------------------------------------------------------------------------------------------


def lookup_question(
    rng: Random,
    most: int = MOST_THINGS,
    plainly: bool = False,
    in_words: float = 0.5,
    questions: int = 10,
    lists: int = 0,
    letters: int = 0,
) -> QuizText:
    """A complete caption and questions about it, most about a thing's attributes: the readers' first lessons.

    There are at least two things if ``most`` allows, so that one has to be found. ``plainly``: all captions have one
    wording; ``lists``: number of requests to list all things; ``letters``: number of requests for the letters of all
    options.
    """
    while len((scene := sample_of("train", rng, most, 0.5)).things) < min(most, 2):
        pass
    caption = dense_caption(scene, rng, style=PLAIN) if plainly else rng.choice((dense_caption, retold))(scene, rng)
    facts = facts_of(scene)
    branches = [Branch(LIST, listed(scene, rng), "text") for _ in range(lists)]
    branches += [_spelled(quiz(scene, sample_asked(scene, rng), rng), rng) for _ in range(letters)]
    while len(branches) < questions + lists + letters:
        asked = sample_asked(scene, rng)
        if asked.kind in BOUND or rng.random() < 0.2:
            branches.append(_read_branch(scene, facts, rng, in_words, asked))
    return QuizText(caption_prompt(caption), tuple(branches))


def listed(scene: Scene, rng: Random) -> str:
    """All things, each with its attributes, in any order: "star red small top left, circle ...".

    A thing's later attributes have to be looked up by its first: ten answers in the tokens of two questions.
    """
    things = rng.sample(scene.things, len(scene.things))
    descriptions = ([thing.shape, thing.color, thing.size, thing.place] for thing in things)
    return " " + ", ".join(" ".join(rng.sample(attributes, len(attributes))) for attributes in descriptions)


def _spelled(question: Question, rng: Random) -> Branch:
    """The letters of all options of a question, in any order: "star B, circle A, ..."."""
    choices = (*question.options, ABSTAIN)
    order = rng.sample(range(len(choices)), len(choices))
    letters = {choice: letter for letter, choice in zip(LETTERS, order, strict=False)}
    pairs = [f"{choices[choice]} {letters[choice]}" for choice in rng.sample(range(len(choices)), len(choices))]
    return Branch(put(question, order) + SPELL, " " + ", ".join(pairs), "text")


def reading(rng: Random, most: int = MOST_THINGS, questions: int = 8, in_words: float = 0.15) -> QuizText:
    """A caption and questions about its scene, to be answered from it alone; some captions are another scene's."""
    scene = sample_of("train", rng, most, 0.5)
    draw = rng.random()
    caption: str | None
    caption, facts = augmented_caption(scene if draw < 0.9 else sample_of("train", rng, most, 0.5), rng)
    if draw > 0.96:
        caption, facts = rng.choice((None, "", caption.split(".")[0])), Facts()
        if caption:
            caption, facts = "An image.", Facts()
    branches = tuple(_read_branch(scene, facts, rng, in_words) for _ in range(questions))
    return QuizText(caption_prompt(caption), branches)


def _read_branch(scene: Scene, facts: Facts, rng: Random, in_words: float, asked: Asked | None = None) -> Branch:
    asked = asked or sample_asked(scene, rng)
    question = quiz(scene, asked, rng)
    answer = solve(asked, facts)
    if rng.random() < in_words:
        # Half of the prompts show the options: the answer that selects a letter must be known there, too.
        order = rng.sample(range(len(question.options) + 1), len(question.options) + 1)
        text = put(question, order) if rng.random() < 0.5 else f"Question: {question.text}\n"
        return Branch(text + WORDS_ONLY, answer or ABSTAIN, "words")
    if answer is not None and answer not in question.options and rng.random() < 0.7:
        # The caption is of another scene: its answer has to be among the options, too.
        question = replace(question, options=(answer, *question.options[1:]))
    return lettered(question, answer, rng)


def lettered(question: Question, answer: str | None, rng: Random) -> Branch:
    """The question in a random order of its choices; abstaining is right if ``answer`` is None or no option."""
    choices = len(question.options) + 1
    order = rng.sample(range(choices), choices)
    choice = question.options.index(answer) if answer in question.options else choices - 1
    means = (*question.options, ABSTAIN)[choice]
    return Branch(put(question, order), LETTERS[order.index(choice)], means=means)


# --- the teacher -----------------------------------------------------------------------------------------------------


def seeing(rng: Random, most: int = MOST_THINGS, questions: int = 8) -> QuizText:
    """An image and questions about it alone, half of them to be answered in words: the teacher's first lessons."""
    scene = sample_of("train", rng, most, 0.5)
    branches = tuple(_read_branch(scene, facts_of(scene), rng, 0.5) for _ in range(questions))
    return QuizText(image_prompt(), branches, scene)


def telling(rng: Random, most: int = MOST_THINGS) -> QuizText:
    """An image and a request for a dense caption."""
    scene = sample_of("train", rng, most, 0.5)
    return QuizText("", (Branch(rng.choice(DENSE), dense_caption(scene, rng), "text"),), scene)


def looking(rng: Random, most: int = MOST_THINGS, questions: int = 8, in_words: float = 0.15) -> QuizText:
    """An image and questions: most about it, some that give away their answer, some about another scene."""
    scene = sample_of("train", rng, most, 0.5)
    return QuizText(image_prompt(), tuple(_look_branch(scene, rng, in_words) for _ in range(questions)), scene)


def _look_branch(scene: Scene, rng: Random, in_words: float) -> Branch:
    draw = rng.random()
    if draw < 0.03:
        return _knowledge(rng)
    if rng.random() < PRESENCE_SHARE:
        return _presence_branch(sample_presence(scene, rng), True, rng, in_words)
    other = scene if draw < 0.88 else sample_of("train", rng, MOST_THINGS, 0.5)
    asked = sample_asked(other, rng)
    if draw < 0.12 or draw > 0.97:
        asked = leaking(asked, other)
    question = quiz(other, asked, rng)
    answer = solve(asked, facts_of(scene))
    if rng.random() < in_words:
        return Branch(f"Question: {question.text}\n{WORDS_ONLY}", answer or ABSTAIN, "words")
    return lettered(question, answer, rng)


def guessing(rng: Random, questions: int = 5) -> QuizText:
    """The same questions without an image: only those that give away their answer or are common knowledge have one."""
    return QuizText(image_prompt(), tuple(_guess_branch(rng) for _ in range(questions)))


def _guess_branch(rng: Random) -> Branch:
    if rng.random() < 0.15:
        return _knowledge(rng)
    scene = sample_of("train", rng, MOST_THINGS, 0.5)
    if rng.random() < PRESENCE_SHARE:
        return _presence_branch(sample_presence(scene, rng), False, rng)
    asked = sample_asked(scene, rng)
    if rng.random() < 0.5:
        asked = leaking(asked, scene)
    answer = solve(asked, facts_of(scene)) if asked.leaks else None
    return lettered(quiz(scene, asked, rng), answer, rng)


def _presence_branch(presence: Presence, seen: bool, rng: Random, in_words: float = 0.0) -> Branch:
    """A yes-or-no question with the option to abstain, which is right unless the image is ``seen``."""
    answer = OPTIONS[0 if presence.holds else 1] if seen else None
    if rng.random() < in_words:
        return Branch(f"Question: {presence.text}\n{WORDS_ONLY}", answer or ABSTAIN, "words")
    return lettered(Question(presence.text, OPTIONS, 0), answer, rng)


def _knowledge(rng: Random) -> Branch:
    text, right, pool = rng.choice(KNOWLEDGE)
    others = [value for value in pool if value != right]
    options = [right, *rng.sample(others, min(len(others), rng.choice((2, 3, 3, 4))))]
    return lettered(Question(text, tuple(options), 0), right, rng)


def writing(rng: Random, most: int = MOST_THINGS) -> QuizText:
    """An image and a request for questions about it, answered in JSON."""
    scene = sample_of("train", rng, most, 0.5)
    count = rng.randint(1, 6)
    return QuizText("", (Branch(writing_prompt(count), written(scene, count, rng), "text"),), scene)


def written(scene: Scene, count: int, rng: Random) -> str:
    """``count`` different questions about ``scene`` as the JSON that :func:`~....quiz.writing_prompt` asks for."""
    entries = []
    for asked in sample_different(scene, count, rng):
        question = quiz(scene, asked, rng)
        entries.append(
            {
                "kind": question.kind,
                "question": question.text,
                "options": list(question.options),
                "answer": question.options[question.answer],
            }
        )
    return json.dumps({"questions": entries})


def sample_different(scene: Scene, count: int, rng: Random) -> list[Asked]:
    """Distinct questions: of different kinds as long as there are any left, none twice."""
    choices = possible(scene)
    rng.shuffle(choices)
    kinds = sorted(KINDS, key=lambda _: rng.random())
    chosen: list[Asked] = []
    while len(chosen) < count and choices:
        for kind in kinds:
            match = next((asked for asked in choices if asked.kind == kind), None)
            if match is not None and len(chosen) < count:
                choices.remove(match)
                chosen.append(match)
    return chosen
