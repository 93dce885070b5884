"""Figures of answers in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.open_table import TITLE
from capipe.trainer.evaluation.results import EvaluationReport, OpenEnded
from capipe.trainer.evaluation.tables import terminal, to_markdown

from ..grading import caption, question, row

SETTINGS = {"model": "tiny/captioner", "reader": "tiny/reader"}
ASKED = [
    {"id": "n", "kind": "count", "question": "How much?", "answers": ["100"]},
    {"id": "t", "kind": "text", "question": "Which word?", "answers": ["colour", "color"]},
]


def opened(key: str, answers: list[tuple[str, str, str | None]], **more: Any) -> dict[str, Any]:
    """A row with answers in words (caption, question, answer), and with multiple choice if ``more`` has any."""
    names = dict.fromkeys(name for name, _, _ in answers)
    captions = [caption(name, "A.", more.get("chosen", {})) for name in names]
    graded = row(key, more.get("asked", []), captions)
    said = [{"name": name, "id": id_, "answer": answer} for name, id_, answer in answers]
    return {**graded, "open_questions": ASKED, "open_answers": said}


def of(report: EvaluationReport, name: str) -> OpenEnded:
    found = next(system.open_ended for system in report.systems if system.name == name)
    assert found is not None
    return found


def test_scores_are_means_over_captions_and_then_over_questions() -> None:
    answers = [
        ("plain#0", "n", "104"),
        ("plain#1", "n", "106"),
        ("plain#0", "t", "Color."),
        ("plain#1", "t", None),
        ("blind", "n", "1"),
        ("blind", "t", "Cannot tell"),
        ("blind", "unknown", "x"),
    ]
    report = evaluate([opened("a", answers)], SETTINGS, resamples=50)
    plain, blind = of(report, "plain"), of(report, "blind")
    assert (plain.relaxed.value, plain.relaxed.n, plain.unanswered) == (0.75, 2, 1)
    assert (blind.relaxed.value, blind.scaled.value, blind.abstained.value) == (0, 0.5, 0.5)
    assert plain.anls.value == pytest.approx(((2 / 3 + 2 / 3) / 2 + 5 / 6) / 2)
    assert report.questions == 0 and report.systems[0].quiz.accuracy.value is None
    assert EvaluationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert f"## {TITLE}" in to_markdown(report) and TITLE in [str(table.title) for table in terminal(report)]


def test_open_ended_questions_stand_beside_multiple_choice() -> None:
    asked, chosen = [question("q")], {"q": [0, 0, 0]}
    rows = [opened(key, [("plain", "n", "100")], asked=asked, chosen=chosen) for key in "ab"]
    report = evaluate(rows, SETTINGS, resamples=50)
    assert of(report, "plain").relaxed.value == report.systems[0].quiz.accuracy.value == 1
    without = evaluate([row("a", asked, [caption("plain", "A.", chosen)])], SETTINGS, resamples=50)
    assert without.systems[0].open_ended is None and TITLE not in to_markdown(without)
