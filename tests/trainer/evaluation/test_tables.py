from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from capipe.models.tiny.world.scenes import Scene, Thing
from capipe.trainer.evaluation.compare import EvaluationRun, compare
from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.results import Caution, Comparison, EvaluationReport
from capipe.trainer.evaluation.tables import escape, terminal, to_json, to_markdown

from ..grading import caption, question, row

NASTY = "A | b\nsecond <script>alert(1)</script> ![x](http://h/x.png) `code` **bold** \\| \x1b[31m"
SCENE = Scene("white", (Thing("top left", "circle", "red", "large"),))


@pytest.fixture
def report() -> EvaluationReport:
    asked = [question("q"), question("r", 3, 2, "[red]odd[/red]")]
    rows = [
        row(
            key,
            asked,
            [
                caption("plain#0", NASTY, {"q": [0, 0, 1], "r": [2, 3, 2, 2]}),
                caption("plain#1", "A red circle.", {"q": [0, 0, 0], "r": [0, 0, 0, 0]}, n_tokens=4),
                caption("blind", None, {"q": [2, 2, 2]}),
            ],
            SCENE,
        )
        for key in ("a", "b")
    ]
    return evaluate([*rows, row("c", None, None, status="corrupt")], {"model": "m|n", "draws": [1, 2]}, resamples=20)


@pytest.fixture
def comparison() -> Comparison:
    rows = [row(key, [question("q")], [caption("plain", "A.", {"q": [0]})]) for key in ("a", "b")]
    worse = [row(key, [question("q")], [caption("plain", "A.", {"q": [1, 0, 0]})]) for key in ("a", "b", "c")]
    settings = {"reader": "r", "model": "one_two"}
    return compare(EvaluationRun("one", rows, settings), EvaluationRun("two", worse, settings), resamples=20)


def test_warnings_come_first_on_the_page_and_cannot_be_markup(report: EvaluationReport) -> None:
    caution = Caution("cannot_read", "blind 0.25 | **<b>bold</b>**", {"blind": 0.25})
    page = to_markdown(replace(report, warnings=(caution,)))
    warning = "**Warning:** blind 0.25 \\| \\*\\*&lt;b&gt;bold&lt;/b&gt;\\*\\*."
    assert page.splitlines()[2] == warning and "Warning" not in to_markdown(report)
    assert json.loads(to_json(replace(report, warnings=(caution,))))["warnings"][0]["figures"] == {"blind": 0.25}


def printed(value: EvaluationReport | Comparison) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(*terminal(value))
    return out.getvalue()


def cells(page: str, title: str) -> list[list[str]]:
    """The rows of the Markdown table under a title, split as a renderer splits them."""
    section = page.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in section.splitlines()]


def test_terminal_tables_say_what_was_measured(report: EvaluationReport) -> None:
    text = printed(report)
    assert "2 images in 3 rows" not in text and "2 images in 2 rows, 4 questions" in text
    assert "Rows excluded: 1 corrupt." in text and "2 are unscored" in text
    plain = next(line for line in text.splitlines() if "plain" in line)
    # q: (2/3 + 1)/2, r: (3/4 + 0)/2; best: 1 and 3/4
    assert "60.4 (60.4, 60.4)" in plain and "87.5 (87.5, 87.5) of 2" in plain
    assert "[red]odd[/red]" in text, "a kind was taken for rich's markup"
    assert "chair_i" in text and "distinct-2" in text


def test_a_table_with_nothing_to_say_is_left_out() -> None:
    bare = evaluate([row("a", [question("q")], [caption("blind", None, {"q": [0]})])], {}, resamples=5)
    assert "chair_i" not in printed(bare) and "distinct-2" not in printed(bare)
    assert "## Truth" not in to_markdown(bare) and "## Settings" not in to_markdown(bare)
    assert "100.0 (–)" in printed(bare)


def test_json_comes_back(report: EvaluationReport, comparison: Comparison) -> None:
    assert EvaluationReport.from_dict(json.loads(to_json(report))) == report
    assert Comparison.from_dict(json.loads(to_json(comparison))) == comparison
    assert NASTY in [each.text for each in EvaluationReport.from_dict(json.loads(to_json(report))).examples]


def test_markdown_shows_captions_as_text_in_one_cell(report: EvaluationReport) -> None:
    page = to_markdown(report)
    assert "<script" not in page and "\x1b" not in page and "![" not in page
    examples = cells(page, "Examples")
    assert {len(line) for line in examples} == {4}
    shown = examples[2][2].strip()
    assert shown.startswith(r"A \| b<br>second &lt;script&gt;alert(1)&lt;/script&gt; !\[x](http://h/x.png) \`code\`")
    assert examples[2][3].strip().startswith("color 2/3") and "(1 cannot tell)" in examples[2][3]
    assert examples[3][2].strip() == "–"  # blind


def test_every_markdown_table_is_rectangular(report: EvaluationReport, comparison: Comparison) -> None:
    for page in (to_markdown(report), to_markdown(comparison)):
        titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
        assert len(titles) == len(set(titles))
        for title in titles:
            assert len({len(line) for line in cells(page, title)}) == 1, title
    assert cells(to_markdown(report), "Settings")[2] == [" model ", r" m\|n "]


def test_places_and_kinds_are_in_markdown(report: EvaluationReport) -> None:
    page = to_markdown(report)
    places = cells(page, "Right % by place of the right option")
    assert places[0] == [" place ", " plain ", " blind "] and places[2][0] == " 1 "
    kinds = cells(page, "Right % by kind of question")
    assert kinds[2][:2] == [" color ", " 2 "] and kinds[3][3] == " – ", "blind was never asked the second kind"


def test_a_comparison_states_what_was_left_out(comparison: Comparison) -> None:
    for text in (" ".join(printed(comparison).split()), to_markdown(comparison)):
        assert "2 common images, 2 common questions" in text and "only in the second 1;" in text
        assert "-33.3 (-33.3, -33.3)" in text
    page = to_markdown(comparison)
    assert "paired bootstrap" in page and "Both read by r" in page
    assert cells(page, "Settings")[3] == [" model ", r" one\_two ", r" one\_two "]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a & b", "a &amp; b"),
        ("a\r\nb\u2028c", "a<br>b<br>c"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("\\|", "\\\\\\|"),
        ("[a](b) ~~c~~ $d$ e_f", "\\[a](b) \\~\\~c\\~\\~ \\$d\\$ e\\_f"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert escape(text) == shown
