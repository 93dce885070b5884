from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.world.captions import dense_caption, short_caption
from capipe.models.tiny.world.grade import Facts, Grade, SignClaim, ThingClaim, grade, is_true, parse, total
from capipe.models.tiny.world.scenes import COLORS, WORDS, Scene, Sign, Thing, scenes

RED = Thing("top left", "circle", "red", "large")
BLUE = Thing("center", "star", "blue", "small")
SCENE = Scene("white", (RED, BLUE), Sign("STOP", "bottom right"))
TOLD = (
    "There are two shapes on a white background."
    " A large red circle in the top left and a small blue star in the center."
    ' A sign in the bottom right reads "STOP".'
)


def test_dense_captions_are_exact_for_thousands_of_scenes() -> None:
    rng = Random(0)
    grades = [grade(scene, dense_caption(scene, rng)) for scene in scenes("train", 2000, seed=5)]
    assert all(each.exact and each.dense for each in grades)
    assert total(grades).precision() == total(grades).recall() == 1.0


def test_short_captions_are_true_and_leave_most_out() -> None:
    rng = Random(0)
    grades = [grade(scene, short_caption(scene, rng)) for scene in scenes("train", 2000, seed=5)]
    assert all(each.stated and each.correct == each.stated and not each.dense for each in grades)
    assert 0.1 < total(grades).recall() < 0.4


def test_parse_reads_every_claim() -> None:
    assert parse(TOLD) == Facts(
        things=(
            ThingClaim("circle", "red", "large", "top left"),
            ThingClaim("star", "blue", "small", "center"),
        ),
        signs=(SignClaim("STOP", "bottom right"),),
        backgrounds=("white",),
        counts=(2,),
    )


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("red", "green", "color"),
        ("circle", "square", "shape"),
        ("small", "large", "size"),
        ("white", "gray", "background"),
        ("two shapes", "three shapes", "count"),
        ("STOP", "OPEN", "sign"),
        ("bottom right", "bottom left", "sign_place"),
        ("center", "middle left", "place"),
    ],
)
def test_one_planted_error_costs_one_attribute(old: str, new: str, kind: str) -> None:
    right, wrong = grade(SCENE, TOLD), grade(SCENE, TOLD.replace(old, new))
    assert wrong.stated == right.stated and wrong.expected == right.expected
    assert wrong.correct[kind] == right.correct[kind] - 1
    assert wrong.recalled[kind] == right.recalled[kind] - 1
    assert wrong.correct.total() == right.correct.total() - 1
    assert wrong.hallucinated == 0 and not wrong.exact


def test_many_planted_errors_are_counted_exactly() -> None:
    rng = Random(0)
    colors = words = 0
    grades = []
    for scene in scenes("train", 300, seed=9):
        wrong = scene
        if rng.random() < 0.5:
            place = rng.randrange(len(scene.things))
            thing = scene.things[place]
            other = rng.choice([color for color in COLORS if color != thing.color])
            swapped = (*scene.things[:place], replace(thing, color=other), *scene.things[place + 1 :])
            wrong, colors = replace(wrong, things=swapped), colors + 1
        if scene.sign is not None and rng.random() < 0.5:
            text = rng.choice([word for word in WORDS if word != scene.sign.text])
            wrong, words = replace(wrong, sign=replace(scene.sign, text=text)), words + 1
        grades.append(grade(scene, dense_caption(wrong, rng)))
    whole = total(grades)
    missed = whole.stated - whole.correct
    assert missed == {"color": colors, "sign": words}
    assert whole.expected - whole.recalled == missed


def test_an_invented_thing_and_an_invented_sign_are_hallucinated() -> None:
    without = replace(SCENE, sign=None)
    extra = TOLD.replace("and a small", "a small green cross in the bottom center and a small")
    got = grade(without, extra)
    assert got.hallucinated == 2
    assert (got.stated - got.correct).total() == 4 + 2
    assert got.recall() == 1.0


def test_an_omitted_thing_costs_recall_only() -> None:
    got = grade(SCENE, TOLD.replace(" and a small blue star in the center", ""))
    assert got.precision() == 1.0
    assert (got.expected - got.recalled) == {"shape": 1, "color": 1, "size": 1, "place": 1}


def test_saying_it_twice_gains_nothing() -> None:
    got = grade(SCENE, f"{TOLD} {TOLD}")
    assert got.recall() == 1.0 and got.hallucinated == 3 and not got.exact
    assert (got.stated - got.correct).total() == 4 + 4 + 2


def test_things_without_a_place_match_what_they_resemble() -> None:
    got = grade(SCENE, "A blue star and a red circle.")
    assert got.precision() == 1.0 and got.hallucinated == 0
    assert grade(SCENE, "A green cross.").hallucinated == 1


@pytest.mark.parametrize(
    "text", ["", "!!!!!!", "A dog runs over a white lawn.", "I cannot help with that", "日本語", "the the the the"]
)
def test_other_text_states_nothing(text: str) -> None:
    assert parse(text) == Facts()
    assert grade(SCENE, text).precision() == 1.0
    assert grade(SCENE, text).recall() == 0.0


def test_grades_add_up() -> None:
    one = grade(SCENE, TOLD)
    assert total([one, one]).stated["color"] == 4
    assert total([]) == Grade()


def test_a_sentence_is_true_if_all_that_it_states_is() -> None:
    assert all(is_true(SCENE, sentence) for sentence in split_sentences(TOLD))
    for sentence in (
        "A red star in the center.",
        "There are three shapes.",
        'A sign reads "OPEN".',
        "A cross.",
        "A sign.",
    ):
        assert is_true(replace(SCENE, sign=None) if sentence == "A sign." else SCENE, sentence) is False
    assert is_true(SCENE, "A star is in the center.") and is_true(SCENE, "A sign is there.")
    assert is_true(SCENE, "Several things on a plain background.") is None and is_true(SCENE, "") is None
    wrong = "A large red circle in the top left and a small blue star in the top right."
    assert is_true(SCENE, wrong) is False, "one wrong place among eight true attributes"
