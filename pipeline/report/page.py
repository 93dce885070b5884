"""`capipe report`: one HTML file that says what a chain made, to be read anywhere, with nothing beside it.

The page has no script and may load nothing; whatever came from data or models is text. It is put together from the
folder as it is at that moment: parts that are missing are left out, parts that are being written are as far as they
are committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...manifests.files.allowed import Allowed
from ...manifests.files.storage import write_new
from ..inspect.discover import find
from ..inspect.images import Pictures, refusals
from ..inspect.shard_join import ShardJoin
from .charts import histogram_chart, interval_chart, line_chart
from .evaluations import gain_of, quiz_bars
from .examples import gallery, losses
from .facts import gather
from .render import render

REPORT = "report.html"


def write_report(
    folder: Path, out: Path | None = None, images: Sequence[str] = (), say: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the report of a chain's folder, or of any folder with artifacts; returns its path.

    ``out`` is ``folder/report.html`` by default and is replaced in one step. ``images``: folders and URLs below which
    tars that manifests name may be read; images that lie elsewhere are left out, which the page and a line to ``say``
    report. Raises BadInput where the folder holds nothing of capipe.
    """
    target = folder / REPORT if out is None else out
    found = find(folder)
    joins, pictures = ShardJoin(found.artifacts), Pictures(Allowed(str(folder), tuple(images)))
    facts, shown, lost = gather(found), gallery(joins, pictures), losses(joins, pictures)
    if (refused := refusals(pictures.refused)) is not None:
        facts.damaged["pictures"] = refused
        say(f"pictures {refused}")
    bars = quiz_bars(facts.evaluations)
    page = render(
        "page.html.j2",
        title=facts.title,
        facts=facts,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        charts=[
            (training, [line_chart(title, lines, "step") for title, lines in training.charts.items()])
            for training in facts.trainings
        ],
        quiz=interval_chart("Questions answered right", bars) if facts.evaluations else None,
        gain=gain_of(facts.evaluations),
        histograms=[(scores, list(map(histogram_chart, scores.histograms))) for scores in facts.scores],
        gallery=shown,
        losses=lost,
        packages=_common([origin.packages for origin in facts.origins]),
    )
    write_new(target, page)
    return target


def _common(packages: list[dict[str, str]]) -> dict[str, str]:
    """Versions that were the same wherever they are named; others are all of them."""
    found: dict[str, list[str]] = {}
    for each in packages:
        for name, version in each.items():
            found.setdefault(name, []).append(version)
    return {name: ", ".join(sorted(set(versions))) for name, versions in found.items()}
