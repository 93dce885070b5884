"""Groups by MinHash bands against every pair compared."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest

from capipe.errors import BadInput
from capipe.stages.dedup.arrays import Indices
from capipe.stages.dedup.texts import leaders
from capipe.stages.dedup.texts.bands import RECALL, SLOTS, Bands, require_rensa, sign
from capipe.stages.dedup.texts.leaders import Leaders, Meetings, group_texts, slow_group_texts
from capipe.stages.dedup.texts.shingles import Shingles, jaccard, normalized, shingles

pytest.importorskip("rensa", reason="the extra 'dedup' is not installed")

SIGNED = [[57, 25706, 59170, 19749], [45351, 47079, 6580, 61548]]
WORDS = "".join(chr(code) for code in range(97, 123))


def sentence(rng: random.Random, words: int) -> list[str]:
    return ["".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(words)]


def corpus(seed: int, texts: int, copies: int) -> list[Shingles]:
    """Random texts, and copies of some in which words are others, or with a letter more."""
    rng = random.Random(seed)
    originals = [sentence(rng, rng.randint(1, 30)) for _ in range(texts)]
    changed = []
    for _ in range(copies):
        words = list(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            words[rng.randrange(len(words))] = "".join(rng.choices(WORDS, k=5))
        if rng.random() < 0.5:
            words = [*rng.choice(originals), rng.choice(WORDS)]
        changed.append(words)
    distinct = dict.fromkeys(normalized(" ".join(words)) for words in (*originals, *changed))
    return [shingles(text) for text in distinct]


def grouped(texts: Sequence[Shingles], threshold: float, priority: Indices) -> Leaders:
    return by(Bands.of(threshold), texts, threshold, priority)


def by(bands: Bands, texts: Sequence[Shingles], threshold: float, priority: Indices) -> Leaders:
    signatures = sign(texts)
    meetings = Meetings.of(bands.keys(signatures).T)
    found = group_texts(priority, meetings, signatures, texts.__getitem__, threshold)
    assert found is not None
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.8, 0.9, 1.0])
def test_what_is_marked_is_near_and_what_is_well_above_is_found(threshold: float) -> None:
    texts = corpus(7, 150, 450)
    priority = np.random.default_rng(3).permutation(len(texts))
    found = grouped(texts, threshold, priority)
    for text, (leader, similarity) in enumerate(zip(found.leader.tolist(), found.similarity.tolist(), strict=True)):
        assert found.leader[leader] == leader
        assert similarity == np.float32(jaccard(texts[text], texts[leader])) >= np.float32(threshold)
        assert text == leader or priority[leader] < priority[text]
    above = 0
    heads = np.flatnonzero(found.leader == np.arange(len(texts))).tolist()
    for position, one in enumerate(heads):
        for other in heads[:position]:
            assert jaccard(texts[one], texts[other]) < min(1.0, threshold + 0.03)
    for text in range(len(texts)):
        above += any(jaccard(texts[text], texts[other]) >= min(1.0, threshold + 0.03) for other in range(text))
    assert threshold == 1.0 or (above > 30 and (found.leader != np.arange(len(texts))).sum() >= above / 2)


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_every_pair_compared_where_bands_miss_none(seed: int) -> None:
    """With bands of two slots of 256, pairs from 0.8 on meet but for one in 10^56."""
    texts = corpus(seed, 80, 240)
    priority = np.random.default_rng(seed).permutation(len(texts))
    found, slow = by(Bands(SLOTS // 2, 2), texts, 0.8, priority), slow_group_texts(priority, texts, 0.8)
    assert found.leader.tolist() == slow.leader.tolist()
    assert found.similarity.tolist() == slow.similarity.tolist()
    assert (slow.leader != np.arange(len(texts))).sum() > 20


def test_groups_do_not_depend_on_the_order_of_the_texts() -> None:
    texts = corpus(5, 80, 240)
    priority = np.random.default_rng(1).permutation(len(texts))
    order = np.random.default_rng(2).permutation(len(texts))
    found, other = grouped(texts, 0.8, priority), grouped([texts[k] for k in order], 0.8, priority[order])
    assert found.leader[order].tolist() == order[other.leader].tolist()


def test_a_chain_of_small_differences_is_no_group() -> None:
    """Each text is near the next one; the last is nothing like the first."""
    words = sentence(random.Random(1), 30)
    others = sentence(random.Random(2), 30)
    texts = [shingles(" ".join([*others[:count], *words[count:]])) for count in range(31)]
    assert all(jaccard(texts[k], texts[k + 1]) > 0.85 for k in range(30)) and jaccard(texts[0], texts[30]) < 0.1
    found = grouped(texts, 0.8, np.arange(31))
    assert len({*found.leader.tolist()}) > 5


def test_a_dense_cluster_costs_a_comparison_each() -> None:
    rng = random.Random(4)
    words = sentence(rng, 60)
    texts = [shingles(" ".join([*words, *sentence(rng, 1)])) for _ in range(300)]
    with mock.patch.object(leaders, "jaccard", wraps=jaccard) as compared:
        found = grouped(texts, 0.8, np.arange(300))
    assert {*found.leader.tolist()} == {0} and compared.call_count < 600


def test_texts_that_agree_in_part_with_too_many_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them below the threshold: no more than some leaders are compared, and it is known of how many."""
    monkeypatch.setattr(leaders, "PER_BAND", 10)
    rng = random.Random(4)
    words = sentence(rng, 30)
    texts = [shingles(" ".join([*words, *sentence(rng, 12)])) for _ in range(200)]
    found = by(Bands(SLOTS, 1), texts, 0.95, np.arange(200))
    assert found.leader.tolist() == list(range(200)) and 150 < found.crowded < 200
    monkeypatch.setattr(leaders, "PER_BAND", 200)
    assert by(Bands(SLOTS, 1), texts, 0.95, np.arange(200)).crowded == 0


def test_texts_whose_signatures_differ_too_much_are_not_compared() -> None:
    rng = random.Random(4)
    words = sentence(rng, 30)
    texts = [shingles(" ".join([*words, *sentence(rng, 30)])) for _ in range(100)]
    with mock.patch.object(leaders, "jaccard", wraps=jaccard) as compared:
        by(Bands(SLOTS, 1), texts, 0.8, np.arange(100))
    assert compared.call_count < 50, "each pair agrees in a band, and in a third of the slots"


def test_few_texts() -> None:
    for count in (0, 1, 2):
        found = grouped([shingles("a dog"), shingles("a cat")][:count], 0.8, np.arange(count))
        assert found.leader.tolist() == list(range(count))


def test_a_stop_is_heeded() -> None:
    texts = corpus(7, 30, 90)
    signatures = sign(texts)
    meetings = Meetings.of(Bands.of(0.8).keys(signatures).T)
    priority = np.arange(len(texts))
    assert group_texts(priority, meetings, signatures, texts.__getitem__, 0.8, lambda: True) is None


@pytest.mark.parametrize("threshold", [0.5, 0.55, 0.7, 0.8, 0.95, 1.0])
def test_bands_reach_the_recall_with_most_rows(threshold: float) -> None:
    bands = Bands.of(threshold)
    assert bands.recall(threshold) >= RECALL and bands.count * bands.rows <= SLOTS
    more = Bands(SLOTS // (bands.rows + 1), bands.rows + 1)
    assert bands.rows == SLOTS or more.recall(threshold) < RECALL
    assert Bands.of(0.8) == Bands(32, 8)


def test_texts_agree_in_a_slot_with_the_probability_of_the_jaccard_index() -> None:
    """256 slots a pair; a hundred pairs."""
    rng = random.Random(9)
    errors = []
    for _ in range(100):
        words = sentence(rng, 15)
        pair = [shingles(" ".join(words)), shingles(" ".join([*words[:12], *sentence(rng, 3)]))]
        one, other = sign(pair)
        errors.append(float((one == other).mean()) - jaccard(*pair))
    assert abs(float(np.mean(errors))) < 0.012 and float(np.std(errors)) < 0.06


def test_signatures_are_the_same_everywhere() -> None:
    """They are in files: another version of the library that gives others must not pass unseen."""
    signatures = sign([shingles("a dog sleeps on a sofa"), shingles("一只猫")])
    assert signatures[:, :4].tolist() == SIGNED


def test_without_rensa_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(BadInput, match=r"need rensa.*pip install 'capipe\[dedup\]'"):
        require_rensa()
