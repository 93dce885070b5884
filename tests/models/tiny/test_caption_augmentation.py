"""What readers are told: captions say exactly the facts that come with them, whatever the wording."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Set
from random import Random

from capipe.models.tiny.train.texts.caption_augmentation import (
    REMARKS,
    all_facts,
    augmented_caption,
    retold,
    sample_omitted,
    with_remark,
)
from capipe.models.tiny.train.texts.quiz import facts_of
from capipe.models.tiny.world.captions import NUMBERS, Fact, dense_caption, short_caption
from capipe.models.tiny.world.grade import Facts, SignClaim, ThingClaim, parse
from capipe.models.tiny.world.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Sign,
    Thing,
    scenes,
)

SYNONYMS = {"big": "large", "little": "small"}
# sha256 of the captions of 400 scenes, as the bundled captioner was taught them.
TAUGHT = "6a65b222dbceef3221f76f9b64f6b553b8c53fe2c8fa3a1458582a1ab2957b53"
SCENE = Scene(
    "brown",
    (Thing("top left", "star", "red", "large"), Thing("center", "circle", "blue", "small")),
    Sign("ZOO", "bottom right"),
)


def words(text: str) -> list[str]:
    return [SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]


def one(text: str, names: tuple[str, ...]) -> str | None:
    """Which of ``names`` a sentence has; at most one may be there."""
    found = [word for word in words(text) if word in names]
    assert len(found) <= 1, text
    return found[0] if found else None


def place_in(text: str) -> str | None:
    found = re.findall("|".join(sorted(PLACES, key=len, reverse=True)), text.lower())
    assert len(found) <= 1, text
    return found[0] if found else None


def read_sentences(caption: str) -> Facts:
    """The facts of a retold caption by a reading of its own: every sentence is of one thing or matter."""
    things, signs, backgrounds, counts = [], [], [], []
    for sentence in filter(None, (part.strip() for part in caption.split("."))):
        if re.search(r"\bsigns?\b", sentence):
            quoted = re.search(r'"(\w+)"', sentence)
            signs.append(SignClaim(quoted[1] if quoted else None, place_in(sentence)))
        elif re.search(r"\b(?:background|behind)\b", sentence):
            background = one(sentence, BACKGROUNDS)
            assert background is not None, sentence
            backgrounds.append(background)
        elif (number := one(sentence, NUMBERS)) is not None:
            counts.append(NUMBERS.index(number))
        else:
            shape, place = one(sentence, SHAPES) or "", place_in(sentence)
            things.append(ThingClaim(shape, one(sentence, COLORS), one(sentence, SIZES), place))
    return Facts(tuple(things), tuple(signs), tuple(backgrounds), tuple(counts))


def in_any_order(facts: Facts) -> tuple[Counter[ThingClaim], tuple[SignClaim, ...], tuple[str, ...], tuple[int, ...]]:
    return Counter(facts.things), facts.signs, facts.backgrounds, facts.counts


def left(scene: Scene, omitted: Set[Fact], kind: str) -> set[str]:
    """The words of a kind of attribute that a caption may still have."""
    things = [thing for thing in scene.things if not {Fact("thing", thing.place), Fact(kind, thing.place)} & omitted]
    return {getattr(thing, kind) for thing in things}


def assert_silent(caption: str, scene: Scene, omitted: Set[Fact]) -> None:
    """``caption`` has no word of what is omitted, unless it is another's, too."""
    said = set(words(caption))
    for kind, names in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        assert said & set(names) == left(scene, omitted, kind), (kind, caption, omitted)
    places = left(scene, omitted, "place")
    if scene.sign is not None and not {Fact("plate"), Fact("sign_place")} & omitted:
        places.add(scene.sign.place)
    assert set(re.findall("|".join(sorted(PLACES, key=len, reverse=True)), caption.lower())) == places, caption
    if Fact("background") in omitted:
        assert not said & {*BACKGROUNDS, "background", "behind"}
    else:
        assert scene.background in said
    assert (f" {NUMBERS[len(scene.things)]} " in f" {' '.join(words(caption))} ") == (Fact("count") not in omitted)
    plate = scene.sign is not None and Fact("plate") not in omitted
    assert ("sign" in said) == plate
    if scene.sign is not None:
        assert (f'"{scene.sign.text}"' in caption) == (plate and Fact("sign") not in omitted)


def omissions(rng: Random, count: int, seed: int) -> list[tuple[Scene, set[Fact]]]:
    return [
        (scene, sample_omitted(scene, rng, rng.choice((0.1, 0.3, 0.6, 0.9))))
        for scene in scenes("train", count, seed=seed)
    ]


def test_what_the_captioner_was_taught_is_unchanged() -> None:
    rng = Random(0)
    pair = (dense_caption, short_caption)
    captions = [write(scene, rng) for scene in scenes("train", 400, seed=0) for write in pair]
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest() == TAUGHT


def test_omitting_leaves_the_style_alone() -> None:
    """It is the same caption, less a fact: an omission may not shift what else is drawn."""
    for seed in range(50):
        whole = dense_caption(SCENE, Random(seed))
        less = re.sub(r" on a brown background| ?The background is brown\.", "", whole).strip()
        assert dense_caption(SCENE, Random(seed), {Fact("background")}) == less != whole
        assert dense_caption(SCENE, Random(seed), set()) == whole


def test_dense_captions_say_all_but_what_is_omitted() -> None:
    rng = Random(0)
    for scene, omitted in omissions(rng, 400, seed=30):
        caption = dense_caption(scene, rng, omitted)
        assert_silent(caption, scene, omitted)
        assert not re.search(r"  | \.|,\.|\ba [aeiou]|\ban [^aeiou]", caption), caption
        assert all(sentence[0].isupper() for sentence in caption.split(". ") if sentence)


def test_dense_captions_of_whole_shapes_are_parsed_to_their_facts() -> None:
    """Where only whole shapes, signs or sentences are left out, a grader reads what a reader is said to be told."""
    rng = Random(0)
    for scene, omitted in omissions(rng, 300, seed=31):
        coarse = {fact for fact in omitted if fact.kind in ("thing", "plate", "background", "count", "sign")}
        assert parse(dense_caption(scene, rng, coarse)) == facts_of(scene, coarse)


def test_retold_captions_say_all_but_what_is_omitted() -> None:
    rng = Random(0)
    for scene, omitted in omissions(rng, 400, seed=32):
        caption = retold(scene, rng, omitted)
        assert_silent(caption, scene, omitted)
        assert in_any_order(read_sentences(caption)) == in_any_order(facts_of(scene, omitted)), (caption, omitted)
        assert not re.search(r"[{}]|  | \.|\ba [aeiou]|\ban [^aeiou]", caption), caption


def test_retold_captions_are_in_no_fixed_order() -> None:
    captions = {retold(SCENE, Random(seed)) for seed in range(60)}
    assert len(captions) > 55
    firsts = Counter("sign" in caption.split(".")[0].lower() for caption in captions)
    assert 3 < firsts[True] < 40


def test_nothing_is_told_when_everything_is_omitted() -> None:
    rng = Random(0)
    everything = {Fact("background"), Fact("count"), Fact("plate"), *(Fact("thing", t.place) for t in SCENE.things)}
    assert retold(SCENE, rng, everything) == ""
    for seed in range(30):  # a style that opens with an introduction has that left
        caption = dense_caption(SCENE, Random(seed), everything)
        assert parse(caption) == Facts()


def test_facts_to_omit_are_of_this_scene_and_drawn_at_their_share() -> None:
    rng = Random(0)
    facts = all_facts(SCENE)
    assert len(set(facts)) == len(facts) == 4 + 4 * len(SCENE.things)
    assert sample_omitted(SCENE, rng, 0.0) == set() and sample_omitted(SCENE, rng, 1.0) >= set(facts)
    draws = [sample_omitted(SCENE, rng, 0.3) for _ in range(1500)]
    counts = Counter(fact for draw in draws for fact in draw)
    assert all(0.25 < counts[fact] / 1500 < 0.35 for fact in facts)
    for whole in (Fact("thing", "center"), Fact("thing", "top left"), Fact("plate")):
        assert 0.11 < counts[whole] / 1500 < 0.19
    assert set(counts) == {*facts, Fact("thing", "center"), Fact("thing", "top left"), Fact("plate")}


def test_remarks_tell_nothing() -> None:
    assert all(parse(remark.format(letter=letter)) == Facts() for remark in REMARKS for letter in "ABCDEF")
    rng = Random(0)
    remarked: set[str] = set()
    for scene in scenes("train", 300, seed=33):
        for caption in (dense_caption(scene, rng), short_caption(scene, rng)):
            with_one = with_remark(caption, rng)
            assert with_one != caption and parse(with_one) == parse(caption)
            assert len(with_one) > len(caption)
            remarked.add("start" if with_one.endswith(caption) else "end" if with_one.startswith(caption) else "inside")
    assert remarked == {"start", "end", "inside"}
    assert with_remark("", rng) in {remark.format(letter=letter) for remark in REMARKS for letter in "ABCDEF"}


def test_told_captions_come_with_what_they_tell() -> None:
    rng = Random(0)
    kinds: Counter[str] = Counter()
    for scene in scenes("train", 600, seed=34):
        caption, facts = augmented_caption(scene, rng)
        assert caption or facts == Facts()
        remark = next((r for r in REMARKS if re.search(re.escape(r).replace(r"\{letter\}", "[A-F]"), caption)), None)
        kinds["remarked"] += remark is not None
        truth = facts_of(scene)
        assert set(facts.backgrounds) <= set(truth.backgrounds) and set(facts.counts) <= set(truth.counts)
        for claim in facts.things:
            assert any(fits(claim, thing) for thing in truth.things)
            assert {word for word in (claim.shape, claim.color, claim.size) if word} <= set(words(caption))
            assert claim.place is None or claim.place in caption.lower()
        kinds["whole"] += facts == truth
        kinds["less"] += facts != truth
    assert 50 < kinds["remarked"] < 140 and kinds["whole"] > 100 and kinds["less"] > 100


def fits(claim: ThingClaim, thing: ThingClaim) -> bool:
    return all(getattr(claim, kind) in ("", None, getattr(thing, kind)) for kind in ("shape", "color", "size", "place"))
