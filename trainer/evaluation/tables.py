"""Reports and comparisons as tables for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ...models.scorers.sentence_truth import TRUE_FROM
from ...terminal import escaped
from .budget_table import budget_grid, open_budget_grid
from .cells import NONE, Grid, number, percent, share, with_interval
from .evaluate import kinds_in_order
from .example_table import examples_grid
from .open_table import open_grid
from .results import Comparison, Difference, EvaluationReport, System

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MARKDOWN = re.compile(r"([\\`*_\[|~$])")  # characters with a meaning inside a line


def to_json(value: EvaluationReport | Comparison) -> str:
    """JSON that ``from_dict`` reads back to an equal value."""
    return json.dumps(value.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def terminal(value: EvaluationReport | Comparison) -> list[Table]:
    """Tables for a terminal: all except positions of the right option and examples."""
    if isinstance(value, Comparison):
        return [_rich(_difference_grid(value))]
    return [
        _rich(grid)
        for grid in (
            _quiz_grid(value),
            budget_grid(value),
            open_grid(value),
            open_budget_grid(value),
            _truth_grid(value),
            _sentence_grid(value),
            _retrieval_grid(value),
            _judged_grid(value),
            _text_grid(value),
            _kinds_grid(value),
        )
        if grid.rows
    ]


def to_markdown(value: EvaluationReport | Comparison) -> str:
    """A Markdown page. Text from models is escaped, so that it cannot be markup."""
    return "\n\n".join(_comparison_page(value) if isinstance(value, Comparison) else _report_page(value)) + "\n"


# --- pages -----------------------------------------------------------------------------------------------------------


def _report_page(report: EvaluationReport) -> Iterator[str]:
    yield "# Evaluation"
    for warning in report.warnings:
        yield f"**Warning:** {escape(warning.text)}."
    yield _method(report)
    if report.settings:
        yield _markdown(_settings_grid({"": report.settings}))
    for grid in (
        _quiz_grid(report),
        budget_grid(report),
        open_grid(report),
        open_budget_grid(report),
        _truth_grid(report),
        _sentence_grid(report),
        _retrieval_grid(report),
        _judged_grid(report),
        _text_grid(report),
        _kinds_grid(report),
        _places_grid(report),
    ):
        if grid.rows:
            yield _markdown(grid)
    if report.examples:
        yield _markdown(examples_grid(report.examples))


def _comparison_page(comparison: Comparison) -> Iterator[str]:
    first, second = comparison.first, comparison.second
    yield "# Comparison"
    yield escape(
        f"First: {first.name}, captions {first.system}. Second: {second.name}, captions {second.system}. "
        f"Both read by {comparison.reader}."
    )
    yield _method(comparison)
    yield _markdown(_difference_grid(comparison))
    yield _markdown(_settings_grid({"first": first.settings, "second": second.settings}))


def _counts(report: EvaluationReport) -> str:
    excluded = ", ".join(f"{count} {reason}" for reason, count in report.excluded.items()) or "none"
    return (
        f"{report.images} images in {report.rows} rows, {report.questions} questions, of which {report.unscored} are "
        f"unscored for some system. Rows excluded: {excluded}."
    )


def _left_out(comparison: Comparison) -> str:
    lost = comparison.left_out
    return (
        f"{comparison.images} common images, {comparison.questions} common questions. Left out: images only in the "
        f"first {lost.images_first}, only in the second {lost.images_second}; of common images, questions only in the "
        f"first {lost.questions_first}, only in the second {lost.questions_second}, unscored {lost.questions_unscored}."
    )


def _method(value: EvaluationReport | Comparison) -> str:
    paired = "paired " if isinstance(value, Comparison) else ""
    return (
        f"In brackets: 95 % percentile intervals of a {paired}bootstrap over images "
        f"({value.resamples} resamples, seed {value.seed}); {NONE} where fewer than two images are behind a figure."
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def _quiz_grid(report: EvaluationReport) -> Grid:
    absent = any(system.quiz.invented.n for system in report.systems)
    rows = [
        (
            system.name,
            percent(system.quiz.accuracy),
            f"{percent(system.quiz.best)} of {system.samples}" if system.samples > 1 else NONE,
            percent(system.quiz.abstained, interval=False),
            percent(system.quiz.score),
            *([percent(system.quiz.invented)] if absent else []),
            str(system.quiz.accuracy.n),
            str(system.quiz.unscored),
            _excluded(system),
        )
        for system in report.systems
    ]
    invented = ["invented %"] if absent else []
    header = (
        "system",
        "right %",
        "best %",
        "cannot tell %",
        "CaptionQA",
        *invented,
        "questions",
        "unscored",
        "excluded",
    )
    note = f"{_counts(report)} Best: of several captions of an image, the one from which a question is answered best."
    note += " CaptionQA: its score, 1 if right, 0 if wrong, 1/K + 0.05 of K options for cannot tell, in per cent."
    if absent:
        note += " Invented: of questions about things that are not there, those answered as if they were."
    return Grid("Quiz", header, tuple(rows), note)


def _truth_grid(report: EvaluationReport) -> Grid:
    rows = [
        (
            system.name,
            percent(truth.precision),
            percent(truth.recall),
            number(truth.wrong.value, 2),
            number(truth.hallucinated.value, 2),
            percent(truth.chair_i),
            percent(truth.chair_s),
            str(truth.captions),
        )
        for system in report.systems
        if (truth := system.truth) is not None
    ]
    header = ("system", "precision %", "recall %", "wrong", "made up", "chair_i %", "chair_s %", "captions")
    note = (
        "Against the scenes. Precision and recall: of attributes. Wrong: false attributes per caption. Made up: things "
        "and signs per caption that are not there; chair_i: their share of those mentioned; chair_s: share of captions "
        "with any."
    )
    return Grid("Truth", header, tuple(rows), note)


def _sentence_grid(report: EvaluationReport) -> Grid:
    checked = [(system.name, system.sentences) for system in report.systems if system.sentences is not None]
    by_scene = any(entry.scene_true.n for _, entry in checked)
    rows = []
    for name, entry in checked:
        cells = [name, percent(entry.true), with_interval(entry.wrong, 2), number(entry.probability.value, 3)]
        if by_scene:
            agreement = percent(entry.agreement, interval=False)
            cells += [percent(entry.scene_true), with_interval(entry.scene_wrong, 2), agreement]
        rows.append((*cells, str(entry.true.n), str(entry.captions), str(entry.unanswered)))
    scene = ("true by scene %", "wrong by scene", "agreement %") if by_scene else ()
    header = ("system", "true %", "wrong", "probability", *scene, "sentences", "captions", "unanswered")
    note = (
        f"By a vision-language model, which Settings name: a sentence is true from a probability of {TRUE_FROM:g}. "
        "Their share is the precision of DCScore, with sentences as its units. Wrong: other sentences, per caption. "
        "Unanswered: captions with a sentence without an answer, in no figure."
    )
    if by_scene:
        note += " By scene: exactly, where a sentence states anything known; agreement: sentences judged alike."
    return Grid("Sentences", header, tuple(rows), note)


def _retrieval_grid(report: EvaluationReport) -> Grid:
    retrievals = [(system.name, system.retrieval) for system in report.systems if system.retrieval is not None]
    rows = [(name, *map(percent, entry.recall.values()), str(entry.captions)) for name, entry in retrievals]
    header = ("system", *(f"recall@{k} %" for k in retrievals[0][1].recall), "captions") if retrievals else ()
    gallery = retrievals[0][1].gallery if retrievals else 0
    note = f"Captions that find their own image among the first k of {gallery}, by cosine; ties count against them."
    return Grid("Retrieval", header, tuple(rows), note)


def _judged_grid(report: EvaluationReport) -> Grid:
    rows = [
        (
            system.name,
            with_interval(judged.cosine, 3),
            NONE if judged.logp.value is None else f"{math.exp(-judged.logp.value):.2f}",
            with_interval(judged.logp, 3),
        )
        for system in report.systems
        if (judged := system.judged) is not None
    ]
    note = (
        "Cosine: of a caption's features and its image's, mean over captions. Perplexity: exp of minus the mean "
        "log-probability of a caption's tokens under the language model. Settings name the models."
    )
    return Grid("Other models", ("system", "cosine", "perplexity", "log-probability"), tuple(rows), note)


def _text_grid(report: EvaluationReport) -> Grid:
    rows = [
        (
            system.name,
            number(text.words, 1),
            number(text.tokens, 1),
            str(text.vocabulary),
            number(text.distinct_1, 3),
            number(text.distinct_2, 3),
            number(text.rep_4, 3),
            share(text.loops),
            share(text.identical),
            number(text.colors, 2),
            share(text.phrases),
        )
        for system in report.systems
        if (text := system.text) is not None
    ]
    header = (
        "system",
        "words",
        "tokens",
        "vocabulary",
        "distinct-1",
        "distinct-2",
        "rep-4",
        "loops %",
        "identical %",
        "colours",
        "phrases %",
    )
    note = (
        "Distinct-n: distinct words and pairs of words among all. Rep-4: repeated 4-grams within a caption. "
        "Loops: captions in which a phrase loops. Identical: captions that are also another image's. "
        "Colours: distinct colour words in a caption. Phrases: captions with 'an image of' and the like, or a year."
    )
    return Grid("Text", header, tuple(rows), note)


def _kinds_grid(report: EvaluationReport) -> Grid:
    kinds = kinds_in_order(kind for system in report.systems for kind in system.quiz.by_kind)
    rows = []
    for kind in kinds:
        figures = [system.quiz.by_kind.get(kind) for system in report.systems]
        most = max(figure.n for figure in figures if figure is not None)
        cells = [NONE if figure is None else percent(figure) + _fewer(figure.n, most) for figure in figures]
        rows.append((kind, str(most), *cells))
    header = ("kind", "n", *(system.name for system in report.systems))
    return Grid("Right % by kind of question", header, tuple(rows), "n: questions, where a cell says nothing else.")


def _places_grid(report: EvaluationReport) -> Grid:
    shown = {system.name: {entry.place: entry for entry in system.quiz.by_place} for system in report.systems}
    places = sorted({position for by_place in shown.values() for position in by_place})
    rows = []
    for position in places:
        entries = [by_place.get(position) for by_place in shown.values()]
        cells = [NONE if entry is None else f"{100 * entry.accuracy:.1f} (n={entry.scored})" for entry in entries]
        rows.append((str(position + 1), *cells))
    note = "n: presentations. Figures that differ between places show a reader that prefers some of them."
    return Grid("Right % by place of the right option", ("place", *shown), tuple(rows), note)


def _settings_grid(settings: Mapping[str, Mapping[str, Any]]) -> Grid:
    keys = dict.fromkeys(key for side in settings.values() for key in side)
    rows = [(key, *(_setting(side.get(key)) for side in settings.values())) for key in keys]
    return Grid("Settings", ("", *settings), tuple(rows), words=True)


def _difference_grid(comparison: Comparison) -> Grid:
    rows = [_difference_row("all", comparison.overall)]
    rows += [_difference_row(kind, difference) for kind, difference in comparison.by_kind.items()]
    header = ("kind", "n", "first %", "second %", "second - first", "p")
    return Grid("Difference in right answers, in points", header, tuple(rows), _left_out(comparison))


def _difference_row(name: str, difference: Difference) -> tuple[str, ...]:
    return (
        name,
        str(difference.difference.n),
        percent(difference.first, interval=False),
        percent(difference.second, interval=False),
        percent(difference.difference, sign="+"),
        NONE if difference.p is None else f"{difference.p:.3f}",
    )


# --- cells -----------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Escape ``text`` to one line of Markdown without markup, HTML or table cells."""
    shown = _MARKDOWN.sub(r"\\\1", html.escape(text, quote=False))
    return "<br>".join(" ".join(_CONTROL.sub(" ", line).split()) for line in shown.splitlines())


def _markdown(grid: Grid) -> str:
    rule = ["---", *["---" if grid.words else "---:"] * (len(grid.header) - 1)]
    lines = [[escape(cell) for cell in line] for line in (grid.header, *grid.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return f"## {escape(grid.title)}\n\n{table}" + (f"\n\n{escape(grid.note)}" if grid.note else "")


def _rich(grid: Grid) -> Table:
    table = Table(title=_text(grid.title), caption=_text(grid.note) if grid.note else None, caption_justify="left")
    for column, name in enumerate(grid.header):
        table.add_column(_text(name), justify="left" if column == 0 else "right")
    for row in grid.rows:
        table.add_row(*map(_text, row))
    return table


def _text(cell: str) -> Text:
    """Text without rich markup and terminal control sequences, which names may contain."""
    return Text(escaped(cell))


def _fewer(n: int, most: int) -> str:
    return "" if n == most else f" (n={n})"


def _excluded(system: System) -> str:
    return ", ".join(f"{count} {status}" for status, count in system.excluded.items()) or "0"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
