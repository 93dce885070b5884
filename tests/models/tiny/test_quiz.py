"""Questions about scenes: their answers against the scenes themselves, and their words there and back."""

from __future__ import annotations

from collections.abc import Set
from random import Random

import pytest

from capipe.models.tiny.train.texts.caption_augmentation import sample_omitted
from capipe.models.tiny.train.texts.quiz import (
    FRAMES,
    KINDS,
    POOLS,
    PUBLIC_KIND,
    Asked,
    ask,
    facts_of,
    leaking,
    possible,
    quiz,
    sample_asked,
    solve,
    understand,
)
from capipe.models.tiny.world.captions import NUMBERS, Fact, dense_caption
from capipe.models.tiny.world.grade import Facts, ThingClaim, parse
from capipe.models.tiny.world.scenes import Scene, Sign, Thing, scenes

ATTRIBUTES = ("shape", "color", "size", "place")
TWINS = Scene(
    "gray",
    (
        Thing("top left", "star", "red", "large"),
        Thing("center", "star", "red", "small"),
        Thing("bottom right", "cross", "pink", "small"),
    ),
    Sign("EXIT", "middle left"),
)


def pointed(asked: Asked) -> dict[str, str]:
    """What the question says of the shape it asks about."""
    return {kind: said for kind in ATTRIBUTES if (said := getattr(asked.target, kind, None))}


def meant(asked: Asked, scene: Scene) -> list[Thing]:
    said = pointed(asked).items()
    return [thing for thing in scene.things if all(getattr(thing, kind) == value for kind, value in said)]


def true_answers(asked: Asked, scene: Scene) -> list[str]:
    """Every answer that a look at the scene allows."""
    if asked.target is not None:
        return [getattr(thing, asked.kind) for thing in meant(asked, scene)]
    of_sign = {"sign": scene.sign.text, "sign_place": scene.sign.place} if scene.sign else {}
    known = {"background": scene.background, "count": NUMBERS[len(scene.things)], **of_sign}
    return [known[asked.kind]] if asked.kind in known else []


def every_way(scene: Scene) -> list[Asked]:
    """All questions about attributes of shapes in the scene, whatever set of the others they are pointed at by."""
    asked = []
    for thing in scene.things:
        for number in range(1, 16):
            said = {kind: getattr(thing, kind) for bit, kind in enumerate(ATTRIBUTES) if number >> bit & 1}
            target = ThingClaim(said.get("shape", ""), said.get("color"), said.get("size"), said.get("place"))
            asked += [Asked(kind, target) for kind in ATTRIBUTES]
    return asked


def test_what_can_be_asked_has_one_answer_and_does_not_tell_it() -> None:
    for scene in scenes("train", 100, seed=20):
        asked = possible(scene)
        assert len(set(asked)) == len(asked)
        for each in asked:
            (answer,) = true_answers(each, scene)
            assert solve(each, facts_of(scene)) == answer
            assert not each.leaks and each.kind not in pointed(each)
            assert answer in POOLS[each.kind]
        of_sign = {each.kind for each in asked} & {"sign", "sign_place"}
        assert of_sign == ({"sign", "sign_place"} if scene.sign else set())


def test_twins_are_only_asked_for_by_what_tells_them_apart() -> None:
    asked = possible(TWINS)
    assert {each.kind for each in asked} == set(KINDS)
    for each in asked:
        assert each.target is None or len(meant(each, TWINS)) == 1
    by_star = Asked("color", ThingClaim("star"))
    assert by_star not in asked and solve(by_star, facts_of(TWINS)) is None  # two: although both are red
    assert Asked("color", ThingClaim("star", place="center")) in asked
    assert Asked("color", ThingClaim("star", size="small")) in asked
    assert Asked("shape", ThingClaim("", color="pink")) in asked


def test_answers_are_those_of_a_look_at_the_scene() -> None:
    for scene in scenes("train", 60, seed=21):
        facts = facts_of(scene)
        for asked in every_way(scene):
            answers = true_answers(asked, scene)
            assert solve(asked, facts) == (answers[0] if len(answers) == 1 else None), asked


def test_a_question_is_understood_as_it_was_meant() -> None:
    rng = Random(0)
    frames: set[str] = set()
    for scene in scenes("train", 100, seed=22):
        for asked in possible(scene):
            for each in (asked, leaking(asked, scene)):
                text = ask(each, rng)
                assert understand(text) == each, text
                assert understand("  " + text.replace(" ", "\n ", 1)) == each
                frames.add(text.split(" the ")[0])
    for frame in (frame for frames_of_kind in FRAMES.values() for frame in frames_of_kind):
        assert any(frame.startswith(seen) for seen in frames), frame


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What color is the moon?",
        "What color is the red?",
        "What color is the circle",
        "Is the circle red?",
        "What color is the circle in the attic?",
        "What color is the large large star?",
        "How many shapes are there? How many shapes are there?",
    ],
)
def test_other_words_are_not_understood(text: str) -> None:
    assert understand(text) is None


def test_facts_are_what_a_dense_caption_is_graded_by() -> None:
    rng = Random(0)
    for scene in scenes("train", 300, seed=23):
        assert facts_of(scene) == parse(dense_caption(scene, rng))


def test_facts_without_everything_are_nothing() -> None:
    everything = {Fact("background"), Fact("count"), Fact("plate"), *(Fact("thing", t.place) for t in TWINS.things)}
    assert facts_of(TWINS, everything) == Facts()


def is_told(asked: Asked, scene: Scene, omitted: Set[Fact]) -> bool:
    """Whether what a question points with, and what it asks for, are all still there."""
    if asked.target is None:
        whole = Fact("plate") in omitted if asked.kind.startswith("sign") else False
        return not whole and Fact(asked.kind) not in omitted
    (thing,) = meant(asked, scene)
    needed = {"thing", asked.kind, *pointed(asked)}
    return not any(Fact(kind, thing.place) in omitted for kind in needed)


def test_an_answer_is_gone_exactly_when_what_it_takes_is_gone() -> None:
    rng = Random(0)
    seen = {True: 0, False: 0}
    for scene in scenes("train", 200, seed=24):
        omitted = sample_omitted(scene, rng, rng.choice((0.15, 0.3, 0.6)))
        facts = facts_of(scene, omitted)
        for asked in possible(scene):
            told = is_told(asked, scene, omitted)
            seen[told] += 1
            assert solve(asked, facts) == (true_answers(asked, scene)[0] if told else None), (asked, omitted)
    assert min(seen.values()) > 500


def test_a_single_omission_silences_the_questions_about_it_alone() -> None:
    facts = facts_of(TWINS, {Fact("color", "center")})
    assert solve(Asked("color", ThingClaim("star", place="center")), facts) is None
    assert solve(Asked("color", ThingClaim("star", place="top left")), facts) == "red"
    assert solve(Asked("size", ThingClaim("", place="center")), facts) == "small"
    nameless = facts_of(TWINS, {Fact("shape", "bottom right")})
    assert solve(Asked("shape", ThingClaim("", color="pink")), nameless) is None
    assert solve(Asked("place", ThingClaim("", color="pink")), nameless) == "bottom right"


def test_leaking_questions_leak_and_have_the_same_answer() -> None:
    rng = Random(0)
    for scene in scenes("train", 100, seed=25):
        for asked in possible(scene):
            leaked = leaking(asked, scene)
            (answer,) = true_answers(asked, scene)
            if asked.target is None:
                assert leaked == asked and not leaked.leaks
                continue
            assert leaked.leaks and pointed(leaked) == {**pointed(asked), asked.kind: answer}
            assert solve(leaked, facts_of(scene)) == answer
            assert answer in ask(leaked, rng)


def test_options_are_two_to_six_different_ones_with_one_right() -> None:
    rng = Random(0)
    places, sizes = dict.fromkeys(range(4), 0), set()
    for scene in scenes("train", 800, seed=26):
        asked = sample_asked(scene, rng)
        question = quiz(scene, asked, rng)
        (right,) = true_answers(asked, scene)
        assert question.options[question.answer] == right and question.options.count(right) == 1
        assert 2 <= len(question.options) <= 6 and len(set(question.options)) == len(question.options)
        assert set(question.options) <= set(POOLS[asked.kind]) | {right}
        assert question.kind == PUBLIC_KIND.get(asked.kind, asked.kind)
        assert understand(question.text) == asked
        sizes.add(len(question.options))
        if len(question.options) == 4:
            places[question.answer] += 1
    assert sizes == {2, 3, 4, 5, 6}
    fours = sum(places.values())
    assert fours > 200 and all(0.15 < count / fours < 0.35 for count in places.values())


def test_some_wrong_options_are_seen_elsewhere_in_the_scene() -> None:
    """Else who guesses could pass over what is nowhere to be seen."""
    rng = Random(0)
    elsewhere = asked_of_several = 0
    for scene in scenes("train", 1500, seed=27):
        asked = sample_asked(scene, rng)
        (right,) = true_answers(asked, scene)
        others = {thing.color for thing in scene.things} - {right}
        if asked.kind == "color" and others:
            options = quiz(scene, asked, rng).options
            asked_of_several += 1
            elsewhere += bool(others & set(options))
    assert asked_of_several > 50 and elsewhere / asked_of_several > 0.6


def test_kinds_are_asked_alike_often() -> None:
    rng = Random(0)
    counts = dict.fromkeys(KINDS, 0)
    for _ in range(1200):
        counts[sample_asked(TWINS, rng).kind] += 1
    assert all(105 < count < 195 for count in counts.values()), counts


def test_the_number_of_things_of_a_crowded_scene_is_not_the_only_large_one() -> None:
    rng = Random(0)
    offered: set[str] = set()
    for scene in scenes("train", 200, seed=0, crowded=1.0):
        question = quiz(scene, Asked("count"), rng)
        assert question.options[question.answer] == NUMBERS[len(scene.things)]
        offered |= {option for place, option in enumerate(question.options) if place != question.answer}
    assert offered == set(NUMBERS[1:])
