from __future__ import annotations

import numpy as np
import pytest

from capipe.stages.annotate.loops import find_loop
from capipe.stages.filter.ngrams import repeated_share, words_of
from capipe.trainer.evaluation import bootstrap
from capipe.trainer.evaluation.bootstrap import NOTHING, Array, Ratios, estimate, resampled_ratios, two_sided_p
from capipe.trainer.evaluation.text_statistics import TextTally, loops

FIGURE = ("plain", "accuracy", "")


def interval(parts: Array, wholes: Array, seed: int = 0) -> tuple[float, float, float]:
    draws = resampled_ratios(parts[:, None], wholes[:, None], 1000, seed)[:, 0]
    found = estimate(parts, wholes, draws)
    assert found.value is not None and found.low is not None and found.high is not None
    return found.value, found.low, found.high


def test_a_figure_is_the_sum_of_parts_over_the_sum_of_wholes() -> None:
    ratios = Ratios()
    for image, part, whole in [(0, 1, 1), (0, 0.5, 1), (1, 0, 2), (2, 0.5, 1)]:
        ratios.add(FIGURE, image, part, whole)
    ratios.add(("plain", "chair_i", ""), 1, 0, 0)
    found = ratios.estimates(3, 200, seed=0)
    value = found[FIGURE][0]
    assert value.value == 2 / 5 and value.n == 5  # the mean of the images' own ratios would be 5/12
    assert value.low is not None and value.high is not None and 0 <= value.low < 0.4 < value.high <= 0.75
    assert found["plain", "chair_i", ""][0] == NOTHING
    assert Ratios().estimates(0, 200, seed=0) == {}


def test_draws_are_those_of_a_plain_bootstrap_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, wholes = np.random.default_rng(1).random((2, 7, 3))
    rng = np.random.default_rng(5)
    samples = [rng.integers(0, 7, 7, dtype=np.int32) for _ in range(10)]
    plain = np.array([parts[drawn].sum(axis=0) / wholes[drawn].sum(axis=0) for drawn in samples])
    for block in (1, 21, 1000):
        monkeypatch.setattr(bootstrap, "_BLOCK", block)
        np.testing.assert_allclose(resampled_ratios(parts, wholes, 10, seed=5), plain, rtol=1e-12)


def test_a_resample_without_the_figure_gives_nan_and_no_warning() -> None:
    parts, wholes = np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]])
    with np.errstate(all="raise"):
        draws = resampled_ratios(parts, wholes, 100, seed=0)[:, 0]
    assert 0 < np.isnan(draws).sum() < 100 and np.nanmax(draws) == np.nanmin(draws) == 1
    found = estimate(parts[:, 0], wholes[:, 0], draws)
    assert (found.value, found.low, found.high, found.n) == (1.0, None, None, 1)  # one image has no spread


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Images differ in how hard they are, so that answers to questions about one image go together."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        wholes = rng.integers(1, 6, 80).astype(np.float64)
        parts = rng.binomial(wholes.astype(int), rng.beta(1.2, 0.8, 80)).astype(np.float64)
        _, low, high = interval(parts, wholes, seed)
        held += low <= 0.6 <= high
    assert 85 <= held <= 99


def test_questions_about_one_image_are_not_independent() -> None:
    """Five questions an image that all fare alike tell no more than one."""
    once = np.random.default_rng(0).integers(0, 2, 50).astype(np.float64)
    assert interval(once * 5, np.full(50, 5.0)) == interval(once, np.ones(50))


def test_p_counts_draws_on_the_far_side() -> None:
    assert two_sided_p(np.array([-1.0, 1, 1, 1])) == pytest.approx(2 * 2 / 5)
    assert two_sided_p(np.full(999, 0.1)) == pytest.approx(2 / 1000) == two_sided_p(np.full(999, -0.1))
    assert two_sided_p(np.zeros(10)) == 1 == two_sided_p(np.array([1e-17, -1e-17]))
    assert two_sided_p(np.array([np.nan])) is None


# --- text ------------------------------------------------------------------------------------------------------------


def test_words_leave_case_and_punctuation_out() -> None:
    assert words_of('It\'s a "T-shirt" – RED, red!') == ["it's", "a", "t-shirt", "red", "red"]


def test_text_figures_by_hand() -> None:
    tally = TextTally()
    tally.add("A red circle.", 4, image=0)
    tally.add("a red square and a red square and a red square", None, image=1)
    tally.add("A red circle.", 8, image=2)
    found = tally.statistics()
    assert (found.captions, found.words, found.tokens) == (3, 17 / 3, 6)
    assert found.vocabulary == 5 and found.distinct_1 == 5 / 17  # a red circle square and
    # a-red, red-circle; red-square, square-and, and-a
    assert found.distinct_2 == 5 / 14
    assert found.rep_4 == 1 - 4 / 8  # of eight 4-grams, four are distinct; the short ones have none
    assert found.identical == 2 / 3 and found.loops == 0


def test_colours_are_counted_once_a_caption_and_boilerplate_by_the_caption() -> None:
    tally = TextTally()
    tally.add("An image of a red star, a red circle and a blue square, taken in 1999.", None, image=0)
    tally.add("An imageof something", None, image=1)
    found = tally.statistics()
    assert (found.colors, found.phrases) == (1.0, 0.5)


def test_a_caption_repeated_for_its_own_image_is_not_another_images() -> None:
    tally = TextTally()
    for image in (0, 0, 1):
        tally.add(["Same.", "Other."][image], None, image)
    assert tally.statistics().identical == 0
    tally.add(" Same. ", None, 1)
    assert tally.statistics().identical == 3 / 4


def test_nothing_written_has_no_figures_rather_than_zeros() -> None:
    tally = TextTally()
    tally.add("", None, 0)
    found = tally.statistics()
    assert (found.words, found.vocabulary, found.identical) == (0, 0, 0)
    assert found.tokens is found.distinct_1 is found.distinct_2 is found.rep_4 is None
    assert TextTally().statistics().words is None


def test_repeated_4_grams() -> None:
    assert repeated_share(["a", "b", "c", "d", "e"]) == 0
    assert repeated_share(["a", "a", "a", "a", "a"]) == 1 / 2
    assert repeated_share(["a", "b", "c"]) == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("times", [3, 4, 7, 8, 9])
def test_the_short_cut_misses_no_loop(length: int, times: int) -> None:
    phrase = " ".join(["!", *(f"w{i}" for i in range(length - 1))])
    text = "Before it, " + " ".join([phrase] * times) + " and after."
    assert loops(text) == (find_loop(text, 4) is not None)
    assert loops(text) == (times >= (4 if length >= 3 else 8))
