"""Costs at 5 million, 100 million and a billion images, from what other benchmarks measured: a table in Markdown.

A cost grows from the largest measured size by the measured exponent, or by 1 if that is smaller: fixed costs make small
runs look better than large ones will be. A benchmark whose result is not given is left out.

    python bench/costs.py RESULT...      # files whose last line is a result: of scaling.py, stages/ingest.py, dedup.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

IMAGES = {"5 M": 5e6, "100 M": 1e8, "1 B": 1e9}
SHARD = 10_000  # images, of the sets above
BY_SHARDS = {
    "start": "`annotate`: start",
    "resume": "`annotate`: resume, nothing left to do",
    "status": "`status` of five artifacts",
    "select_resume": "`filter`: again, nothing left to do",
    "export": "`export`: again, nothing left to do",
    "report": "`report` on five artifacts",
    "view": "`view`: start and first page",
}
BY_ROWS = {
    "select": "`filter --index`, scores given",
    "export_last": "`export`: card and indexes, all shards there",
}


def grown(cost: float, size: float, exponent: float, to: float) -> float:
    """A cost that was measured at ``size``, at the size ``to``."""
    return cost * (to / size) ** max(1.0, exponent)


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, list[float]]]:
    """Steps with their exponent and their core-seconds at the three sizes. ``results``: by name of the benchmark."""
    if (ingest := results.get("ingest")) is not None:
        seconds = ingest["cpu_ms_per_image"]["capipe"] / 1000
        yield "`ingest`, tiny images (linear by its nature)", 1.0, [seconds * images for images in IMAGES.values()]
    if (dedup := results.get("dedup")) is not None:
        exponent = math.log10(dedup["growth_1m_to_10m"])
        at = [grown(60 * dedup["core_minutes_10m"], 1e7, exponent, images) for images in IMAGES.values()]
        yield "`dedup`: search among hashes", exponent, at
    scaling = results.get("scaling")
    if scaling is None:
        return
    shards = max(scaling["shards"])
    for name, title in {**BY_ROWS, **BY_SHARDS}.items():
        exponent = max(scaling["exponents"][name].values())
        size = shards * scaling["rows_per_shard"] if name in BY_ROWS else shards
        scale = 1 if name in BY_ROWS else SHARD
        cost = scaling["core_seconds"][name][str(shards)]
        yield title, exponent, [grown(cost, size, exponent, images / scale) for images in IMAGES.values()]


def shown(seconds: float) -> str:
    """Core-seconds in the unit that fits."""
    for unit, size in (("core-hours", 3600.0), ("core-minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} core-seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="RESULT", nargs="+", type=Path, help="file whose last line is a result")
    read = (json.loads(file.read_text().splitlines()[-1]) for file in parser.parse_args().results)
    results = {result["name"]: result for result in read}
    print(f"| step | exponent | {' | '.join(IMAGES)} |", f"|---|---:|{'---:|' * len(IMAGES)}", sep="\n")
    for title, exponent, costs in rows(results):
        print(f"| {title} | {exponent:.2f} |", " | ".join(map(shown, costs)), "|")


if __name__ == "__main__":
    main()
