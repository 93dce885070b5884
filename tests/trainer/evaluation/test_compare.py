from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.trainer.evaluation.compare import EvaluationRun, compare
from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.results import Comparison, LeftOut
from capipe.trainer.evaluation.tables import to_json

from ..grading import caption, question, row

READ = {"reader": "tiny/reader", "model": "m"}


def one(key: str, answers: dict[str, list[int | None]], name: str = "plain", kind: str = "color") -> dict[str, Any]:
    return row(key, [question(each, kind=kind) for each in answers], [caption(name, "A.", answers)])


def run_of(rows: list[dict[str, Any]], name: str = "run", **settings: str) -> EvaluationRun:
    return EvaluationRun(name, iter(rows), {**READ, **settings})


def draws(seed: int, images: int = 200) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two runs whose images are hard for both or easy for both; the second is better by a tenth."""
    rng = Random(seed)
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for i in range(images):
        easy = rng.random() < 0.5
        for side, chance in enumerate((0.85 if easy else 0.05, 0.95 if easy else 0.15)):
            rows[side].append(one(str(i), {f"{i}q{j}": [0 if rng.random() < chance else 1] for j in range(3)}))
    return rows


def test_difference_by_hand_on_what_is_common() -> None:
    first = [
        one("a", {"q": [0, 1], "r": [1], "only": [0], "too": [0]}),
        one("b", {"s": [1]}, kind="text"),
        one("c", {"t": [0]}),
        one("e", {"v": [0], "w": [None]}),
    ]
    second = [
        one("e", {"v": [None], "w": [0], "more": [0]}),
        one("d", {"u": [0]}),
        one("a", {"q": [0, 0], "r": [1]}),
        one("b", {"s": [0]}, kind="text"),
    ]
    found = compare(run_of(first, "one"), run_of(second, "two"), resamples=200)
    assert found.overall.first.value == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert found.overall.second.value == pytest.approx((1 + 0 + 1) / 3)
    assert found.overall.difference.value == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found.left_out == LeftOut(1, 1, 2, 1, 2)
    assert (found.images, found.questions) == (2, 3)
    assert found.by_kind["color"].difference.value == 0.25 and found.by_kind["text"].difference.value == 1
    assert found.by_kind["text"].p is None and found.by_kind["text"].difference.low is None  # one image
    assert (found.first.system, found.reader) == ("plain", "tiny/reader")


def test_captions_of_one_run_are_averaged_before_the_difference() -> None:
    pair = [caption("plain#0", "A.", {"q": [0]}), caption("plain#1", "B.", {"q": [1]})]
    found = compare(run_of([row("a", [question("q")], pair)]), run_of([one("a", {"q": [0]})]))
    assert found.overall.difference.value == 0.5


def test_pairing_narrows_the_interval_and_finds_what_is_there() -> None:
    first, second = draws(0)
    found = compare(run_of(first), run_of(second))
    difference = found.overall.difference
    assert difference.low is not None and difference.high is not None
    widths = []
    for rows in (first, second):
        alone = evaluate(rows, READ).systems[0].quiz.accuracy
        assert alone.low is not None and alone.high is not None
        widths.append(alone.high - alone.low)
    assert difference.high - difference.low < 0.7 * (widths[0] ** 2 + widths[1] ** 2) ** 0.5
    assert difference.low > 0 and found.overall.p is not None and found.overall.p < 0.01


def test_intervals_of_the_difference_hold_the_truth_and_p_is_fair() -> None:
    held = false_alarms = 0
    for seed in range(25):
        first, second = draws(seed, images=60)
        overall = compare(run_of(first), run_of(second), resamples=400).overall
        assert overall.difference.low is not None and overall.difference.high is not None
        held += overall.difference.low <= 0.1 <= overall.difference.high
        (same, _), (others, _) = draws(seed, images=60), draws(1000 + seed, images=60)
        null = compare(run_of(same), run_of(others), resamples=400).overall
        false_alarms += null.p is not None and null.p < 0.05
    assert held >= 21 and false_alarms <= 4


def test_equal_runs_differ_by_nothing() -> None:
    first, _ = draws(0, images=20)
    overall = compare(run_of(first), run_of(first)).overall
    assert (overall.difference.value, overall.difference.low, overall.difference.high, overall.p) == (0, 0, 0, 1)


def test_systems_are_the_first_prompts_unless_named() -> None:
    both = row(
        "a", [question("q")], [caption(n, "A.", {"q": [c]}) for n, c in (("blind", 0), ("long", 1), ("plain", 0))]
    )
    chosen = compare(run_of([both]), EvaluationRun("two", [both], READ, system="blind"))
    assert (chosen.first.system, chosen.second.system) == ("long", "blind")
    assert chosen.overall.difference.value == 1
    with pytest.raises(BadInput, match=r"two: no captions named 'dense'; there are blind, long, plain"):
        compare(run_of([both]), EvaluationRun("two", [both], READ, system="dense"))
    with pytest.raises(BadInput, match=r"two: no captions of a prompt; there are blind"):
        compare(run_of([both]), run_of([one("a", {"q": [0]}, name="blind")], "two"))
    with pytest.raises(BadInput, match=r"two: no captions of a prompt; there are none at all"):
        compare(run_of([both]), run_of([], "two"))


def test_what_cannot_be_compared_is_refused() -> None:
    rows = [one("a", {"q": [0]})]
    with pytest.raises(BadInput, match="one was graded by tiny/reader, two by other; grade both with one reader"):
        compare(run_of(rows, "one"), run_of(rows, "two", reader="other"))
    same, other = {"reader identity": "a"}, {"reader identity": "b"}
    renamed = compare(run_of(rows, "one", **same), run_of(rows, "two", reader="./tiny/reader", **same))
    assert renamed.images == 1, "another name of the same reader"
    with pytest.raises(BadInput, match="one was graded by tiny/reader, two by tiny/reader; grade both with one reader"):
        compare(run_of(rows, "one", **same), run_of(rows, "two", **other))
    with pytest.raises(BadInput, match="two: it does not say which reader graded it"):
        compare(run_of(rows), EvaluationRun("two", rows, {}))
    for others in ([one("b", {"q": [0]})], [one("a", {"r": [0]})], [one("a", {"q": [None]})]):
        with pytest.raises(BadInput, match="one and two: no question that both have a score for"):
            compare(run_of(rows, "one"), run_of(others, "two"))


def test_a_comparison_survives_json() -> None:
    first, second = draws(0, images=5)
    found = compare(run_of(first), run_of([*second, one("new", {"x": [0]}, kind="other")]), resamples=20)
    assert Comparison.from_dict(json.loads(to_json(found))) == found
