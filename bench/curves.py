"""Training curves: reward, hold-out quiz accuracy, length and hallucinated attributes over the steps.

Each run is a line. The output is byte-identical for the same runs and the same matplotlib.

    python bench/curves.py RUN [RUN ...] --out docs/tiny-curve.svg [--base 0.151] [--oracle 0.958]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from capipe.trainer.log import read_steps

Run = tuple[str, Sequence[Mapping[str, Any]]]  # a name and the entries of `read_steps`
Curve = tuple[list[int], list[float]]
ACCURACY, HALLUCINATED = "validation/accuracy", "validation/hallucinated"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's colour-blind safe palette
STYLE = {
    "svg.fonttype": "none",  # text stays text, for a small file
    "svg.hashsalt": "capipe",  # fixed ids, so that the file is reproducible
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
}


def curve(entries: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """A metric over the number of updates before its measurement; steps without it are left out.

    The captions of a step are sampled before its update, those of a validation after it.
    """
    done = 1 if name.startswith("validation/") else 0
    points = [(entry["step"] + done, entry[name]) for entry in entries if entry.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: Sequence[Run], base: float | None, oracle: float | None, out: Path) -> None:
    """Plot four panels to ``out``, whose suffix sets the format."""
    panels = (
        ("reward", "Reward: mean of a step's captions", "-"),
        (ACCURACY, "Quiz accuracy of greedy held-out captions", "o-"),
        ("tokens_per_caption", "Tokens per caption", "-"),
        (HALLUCINATED, "Stated but absent attributes per greedy caption", "o-"),
    )
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(8.4, 5.4), sharex=True, layout="constrained")
        for axes, (name, title, line) in zip(grid.flat, panels, strict=True):
            for number, (run, entries) in enumerate(runs):
                axes.plot(*curve(entries, name), line, color=COLORS[number % len(COLORS)], markersize=3.5, label=run)
            axes.set_title(title, loc="left")
            axes.set_ylim(bottom=0)
        for axes in grid[1]:
            axes.set_xlabel("steps done")
        level(grid[0, 1], oracle, "oracle captions", "bottom")
        level(grid[0, 1], base, "before training, sampled captions", "bottom")
        for axes in grid[0]:
            axes.set_ylim(0, 1.08)
        bottom, top = grid[1, 1].get_ylim()
        grid[1, 1].set_ylim(bottom, max(0.1, top))  # so that a line of zeros is not the whole panel
        grid[0, 0].legend(loc="lower right", frameon=False)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


def level(axes: Axes, value: float | None, label: str, above: str) -> None:
    """A dashed line across a panel, if there is a value to show."""
    if value is not None:
        axes.axhline(value, color="#555555", linestyle="--", linewidth=0.9)
        text = f"{label}: {value:.3f}"
        axes.text(0.99, value + 0.01, text, transform=axes.get_yaxis_transform(), ha="right", va=above, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `capipe train`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=float, help="quiz accuracy before training")
    parser.add_argument("--oracle", type=float, help="quiz accuracy of captions that tell everything")
    options = parser.parse_args()
    runs = [(folder.resolve().name, read_steps(folder)) for folder in options.runs]
    for folder, (_, entries) in zip(options.runs, runs, strict=True):
        if not entries:
            sys.exit(f"{folder}: no steps.jsonl with a step in it; give the --out of a `capipe train`")
    draw(runs, options.base, options.oracle, options.out)


if __name__ == "__main__":
    main()
