"""Sentences of captions in a report: by the model that checked them, and beside it exactly, by the scene."""

from __future__ import annotations

from typing import Any

import pytest

from capipe.models.tiny.world.scenes import Scene, Thing
from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.results import EvaluationReport, System
from capipe.trainer.evaluation.tables import terminal, to_json, to_markdown

from ..grading import caption, question, row

SCENE = Scene("white", (Thing("top left", "circle", "red", "large"),))
TEXTS = ("A red circle. A blue star.", "There is one shape. Lovely.", "A cross.")
TRUTHS: dict[tuple[str, str], list[float | None]] = {
    ("uid-a", TEXTS[0]): [0.9, 0.2],
    ("uid-b", TEXTS[1]): [0.4, 0.5],
    ("uid-c", TEXTS[2]): [None],
}


def report(truths: Any = TRUTHS, scene: Scene | None = SCENE, **graded: Any) -> EvaluationReport:
    rows = [
        row(key, [question("q")], [caption("plain", text, {"q": [0]}), caption("blind", None, {"q": [2]})], scene)
        for key, text in zip("abc", TEXTS, strict=True)
    ]
    return evaluate(rows, {"reader": "r"}, truths=truths, resamples=50)


def plain(of: EvaluationReport) -> System:
    return of.systems[0]


def test_shares_and_counts_are_of_captions_whose_every_sentence_has_an_answer() -> None:
    sentences = plain(report()).sentences
    assert sentences is not None and (sentences.captions, sentences.unanswered) == (2, 1)
    assert (sentences.true.value, sentences.true.n) == (0.5, 4) and sentences.wrong.value == 1.0
    assert sentences.probability.value == pytest.approx(0.5)
    assert sentences.true.low is not None and sentences.wrong.low is not None, "with an interval, as other figures"
    # by the scene: circle true, star false, one shape true; "Lovely." states nothing
    assert (sentences.scene_true.value, sentences.scene_true.n) == (pytest.approx(2 / 3), 3)
    assert sentences.scene_wrong.value == 0.5 and sentences.agreement.value == pytest.approx(2 / 3)


def test_without_scenes_or_without_a_model_there_is_less() -> None:
    sentences = plain(report(scene=None)).sentences
    assert sentences is not None and sentences.true.value == 0.5 and sentences.scene_true.n == 0
    assert plain(report(None)).sentences is None and report().systems[1].sentences is None


def test_wrong_attributes_are_counted_per_caption() -> None:
    truth = plain(report()).truth
    assert truth is not None
    assert truth.wrong.value == pytest.approx(3 / 3), "shape and color of the star, the shape of the cross"


def test_tables_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    page = to_markdown(report())
    section = page.split("## Sentences")[1].split("\n## ")[0]
    assert "| plain | 50.0 (" in section and "agreement" in section and "true from a probability of 0.5" in section
    assert "scene" not in to_markdown(report(scene=None)).split("## Sentences")[1].split("\n## ")[0]
    assert "## Sentences" not in to_markdown(report(None))
    assert any("Sentences" in str(table.title) for table in terminal(report()))


def test_json_reads_back_and_older_reports_do_too() -> None:
    import json

    data = json.loads(to_json(report()))
    assert EvaluationReport.from_dict(data) == report()
    for system in data["systems"]:
        system.pop("sentences")
        system["quiz"].pop("invented")
        (system["truth"] or {}).pop("wrong", None)
    older = EvaluationReport.from_dict(data)
    assert plain(older).sentences is None and plain(older).quiz.invented.n == 0


def test_what_is_said_to_be_there_and_is_not_is_a_figure_of_its_own() -> None:
    asked = [question("q", 2, 1, "absent"), question("r", 2, 0, "color")]
    rows = [
        row("a", asked, [caption("plain", "A dog.", {"q": [0, 0, 1], "r": [0, 0, 0]})]),
        row("b", asked, [caption("plain", "A cat.", {"q": [2, 2, None], "r": [0, 0, 0]})]),
    ]
    found = evaluate(rows, {"reader": "r"}, resamples=50)
    quiz = plain(found).quiz
    assert (quiz.invented.value, quiz.invented.n) == (pytest.approx(1 / 3), 2)
    assert quiz.by_kind["absent"].value == pytest.approx(1 / 6), "right is no, and no answer is none"
    assert "invented %" in to_markdown(found) and "invented" not in to_markdown(report())
