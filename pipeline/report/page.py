"""`capipe report`: one HTML file that says what a chain made, to be read anywhere, with nothing beside it.

The page has no script and may load nothing; whatever came from data or models is text. It is put together from the
folder as it is at that moment: parts that are missing are left out, parts that are being written are as far as they
are committed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ... import __version__
from ...manifests.files.allowed import Allowed
from ...manifests.files.storage import write_new
from ..inspect.discover import find
from ..inspect.images import Pictures, refusals
from ..inspect.shard_join import ShardJoin
from ..runners.progress import clock
from .charts import Bar, histogram_chart, interval_chart, line_chart, status_bar
from .examples import gallery, losses
from .facts import Evaluation, Facts, gather

REPORT = "report.html"
_HERE = Path(__file__).parent
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_report(
    folder: Path, out: Path | None = None, images: Sequence[str] = (), say: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the report of a chain's folder, or of any folder with artifacts; returns its path.

    ``out`` is ``folder/report.html`` by default and is replaced in one step. ``images``: folders and URLs below which
    tars that manifests name may be read; where more would be needed for its pictures, the page and a line to ``say``
    tell so. Raises BadInput where nothing of capipe is in the folder.
    """
    target = folder / REPORT if out is None else out
    found = find(folder)
    joins, pictures = ShardJoin(found.artifacts), Pictures(Allowed(str(folder), tuple(images)))
    facts, shown, lost = gather(found), gallery(joins, pictures), losses(joins, pictures)
    if (refused := refusals(pictures.refused)) is not None:
        facts.damaged["pictures"] = refused
        say(f"pictures {refused}")
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            facts=facts,
            style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
            version=__version__,
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            charts=[
                (each, [line_chart(title, lines, "step") for title, lines in each.charts.items()])
                for each in facts.trainings
            ],
            quiz=interval_chart("Questions answered right", quiz_bars(facts.evaluations))
            if facts.evaluations
            else None,
            gain=_gain(facts),
            histograms=[(each, list(map(histogram_chart, each.histograms))) for each in facts.scores],
            gallery=shown,
            losses=lost,
            packages=_common([each.packages for each in facts.origins]),
        )
    )
    write_new(target, page.encode())
    return target


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {"clock": clock, "status_bar": status_bar, "number": "{:,}".format}
    return environment


def _printable(value: Any) -> Any:
    """Text without what a terminal or a bidirectional override would make of it; markup of ours as it is."""
    if isinstance(value, Markup):
        return value
    return _CONTROL.sub("\ufffd", value) if isinstance(value, str) else value


def quiz_bars(evaluations: list[Evaluation]) -> list[Bar]:
    """All evaluations in one picture: captions before and after training first, the yardsticks below them."""
    named = [
        Bar(bar.name if not bar.emphasis else f"{label(each)}: {bar.name}", bar.value, bar.low, bar.high, bar.emphasis)
        for each in evaluations
        for bar in each.bars
    ]
    order = {bar.name: None for bar in sorted(named, key=lambda bar: (-bar.emphasis, bar.name.rpartition(": ")[2]))}
    by_name = {bar.name: bar for bar in named}
    return [by_name[name] for name in order]


def label(evaluation: Evaluation) -> str:
    """What an evaluation is called in pictures: its folder."""
    return evaluation.name


def _gain(facts: Facts) -> tuple[str, Bar, Bar] | None:
    """The captions that were evaluated before and after training: their name, and the two figures."""
    after = next((each for each in facts.evaluations if each.after is not None), None)
    before = next((each for each in facts.evaluations if each.after is None), None)
    if after is None or before is None:
        return None
    known = {bar.name: bar for bar in before.bars if bar.emphasis}
    for bar in after.bars:
        if bar.emphasis and bar.name in known:
            return bar.name, known[bar.name], bar
    return None


def _common(packages: list[dict[str, str]]) -> dict[str, str]:
    """Versions that were the same wherever they are named; others are all of them."""
    found: dict[str, list[str]] = {}
    for each in packages:
        for name, version in each.items():
            found.setdefault(name, []).append(version)
    return {name: ", ".join(sorted(set(versions))) for name, versions in found.items()}
