"""`capipe report`: a chain's results in one HTML file.

The page shows the current state of the folder: missing parts are left out, unfinished parts appear as far as they are
committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...manifests.files.allowed import Allowed
from ...manifests.files.outside import is_url
from ...manifests.files.storage import Folder, write_new
from ..inspect.discover import find
from ..inspect.images import RowImages, refusals
from ..inspect.shard_join import ShardJoin
from .before_after import caption_pairs
from .charts import histogram_chart, interval_chart, line_chart
from .evaluations import gain_of, quiz_bars
from .examples import gallery, losses
from .facts import gather
from .render import render

REPORT = "report.html"


def write_report(
    folder: str | Path,
    out: Path | None = None,
    images: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    prices: Mapping[str, float] | None = None,
) -> str:
    """Write the report of a chain's folder, or of any folder (or URL) with artifacts; returns its path or URL.

    ``out`` is ``folder/report.html`` by default and is replaced in one step. ``images``: folders and URLs below which
    tars named by manifests may be read; images elsewhere are left out, as reported by the page and a line to ``say``.
    ``prices``: of an hour of a GPU or core.
    Raises BadInput if the folder holds nothing of capipe.
    """
    contents = find(folder)
    join, row_images = ShardJoin(contents.artifacts), RowImages(Allowed(contents.root, tuple(images)))
    facts, shown, lost = gather(contents), gallery(join, row_images), losses(join, row_images)
    bars, gain = quiz_bars(facts.evaluations), gain_of(facts.evaluations)
    pairs = caption_pairs(join, gain, row_images) if gain is not None else []
    if (refused := refusals(row_images.refused)) is not None:
        facts.damaged["images"] = refused
        say(f"images {refused}")
    page = render(
        "page.html.j2",
        title=facts.title,
        facts=facts,
        prices=prices or {},
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        charts=[
            (training, [line_chart(title, lines, "step") for title, lines in training.charts.items()])
            for training in facts.trainings
        ],
        quiz=interval_chart("Questions answered right", bars) if bars else None,
        gain=gain,
        pairs=pairs,
        histograms=[(scores, list(map(histogram_chart, scores.histograms))) for scores in facts.scores],
        gallery=shown,
        losses=lost,
        packages=_common([origin.packages for origin in facts.origins]),
    )
    if out is None and is_url(contents.root):
        Folder(contents.root).write(REPORT, page)
        return f"{contents.root}/{REPORT}"
    target = Path(contents.root, REPORT) if out is None else out
    write_new(target, page)
    return str(target)


def _common(packages: list[dict[str, str]]) -> dict[str, str]:
    """Package versions; several versions of a package are joined by commas."""
    versions: dict[str, set[str]] = {}
    for named in packages:
        for name, version in named.items():
            versions.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(several)) for name, several in versions.items()}
