"""Figures of captions within word budgets, and CaptionQA's score."""

from __future__ import annotations

import json
from typing import Any

import pytest

from capipe.trainer.evaluation.budget_table import TITLE, budget_grid
from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.results import EvaluationReport
from capipe.trainer.evaluation.tables import terminal, to_markdown

from ..grading import caption, question, row

SETTINGS = {"model": "tiny/captioner", "reader": "tiny/reader"}
RIGHT, WRONG, UNTOLD = {"q": [0, 0, 0]}, {"q": [1, 1, 1]}, {"q": [2, 2, 2]}


def report_on(*captions: dict[str, Any], **more: Any) -> EvaluationReport:
    rows = [row(key, [question("q")], captions) for key in "ab"]
    return evaluate(rows, SETTINGS, resamples=50, **more)


def test_a_row_per_system_and_a_column_per_budget() -> None:
    report = report_on(
        caption("dense#0", "A red star.", RIGHT),
        caption("dense#1", "A red star.", RIGHT),
        caption("dense@2#0", "A red", RIGHT),
        caption("dense@2#1", "A red", WRONG),
        caption("plain", "A star.", WRONG),
        caption("plain@10", "A star.", WRONG),
        caption("blind", None, UNTOLD),
    )
    grid = budget_grid(report)
    assert grid.header == ("system", "2 words", "10 words", "all words")
    assert [[cell.split(" ")[0] for cell in line] for line in grid.rows] == [
        ["dense", "50.0", "–", "100.0"],
        ["plain", "–", "0.0", "0.0"],
    ]
    assert f"## {TITLE}" in to_markdown(report) and TITLE in [str(table.title) for table in terminal(report)]
    assert EvaluationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_no_table_without_budgets() -> None:
    report = report_on(caption("dense", "A red star.", RIGHT))
    assert budget_grid(report).rows == () and TITLE not in to_markdown(report)


def test_captionqa_score() -> None:
    report = report_on(
        caption("sure", "A.", RIGHT), caption("untold", "A.", UNTOLD), caption("mixed", "A.", {"q": [0, 1, 2]})
    )
    scores = {system.name: system.quiz.score.value for system in report.systems}
    assert scores == pytest.approx({"sure": 1.0, "untold": 0.55, "mixed": (1 + 0.55) / 3})
    assert "55.0" in to_markdown(report)


def test_cut_captions_have_no_figures_by_sentence() -> None:
    """Only whole captions were checked; those that fit a budget would stand for all of them."""
    truths = {(f"uid-{key}", "A star."): [0.9] for key in "ab"}
    report = report_on(caption("plain", "A star.", RIGHT), caption("plain@10", "A star.", RIGHT), truths=truths)
    assert [system.sentences is None for system in report.systems] == [False, True]
