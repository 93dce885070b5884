"""`capipe filter`: score, then select."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import BadInput
from ..manifests.artifact import Artifact
from . import options as o
from .interrupts import interrupts
from .outcome import Exit, conclude
from .progress import Progress

if TYPE_CHECKING:
    from ..stages.select import SelectConfig


def filter_(
    shards: o.Shards,
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL): final shards go to its shards/.")],
    scores: Annotated[str | None, typer.Option(help="Scores of an earlier run, of the same shards.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="What to keep: a condition over the columns of the scores, e.g. 'clip_score > 0.28 and "
            '(itm_score_min >= 0.5 or language == "en")\'. A missing value keeps nothing.'
        ),
    ] = None,
    top: Annotated[float | None, typer.Option(help="Fraction to keep of what --keep leaves, best first.")] = None,
    by: Annotated[str | None, typer.Option(help="Column by which --top ranks; clip_score by default.")] = None,
    text: Annotated[
        str, typer.Option(help="Caption to write: re (new), org (original), auto (new where there are any).")
    ] = "auto",
    shard_size: Annotated[int, typer.Option(help="Kept rows per final shard; input shards stay whole.")] = 10_000,
    marks: Annotated[str | None, typer.Option(help="Marks of `capipe dedup`: rows not ok there are not kept.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that copy; one per core by default.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Write the final shards anew; scores stay.")] = False,
) -> None:
    """Keep what the scores believe: final shards, with a row for every input row, and a report with pictures."""
    from ..stages.select import SelectConfig

    if by is not None and top is None:
        raise BadInput(f"--by {by}: ranks nothing without --top; give a fraction, e.g. --top 0.3")
    ranked = {} if by is None else {"by": by}
    config = o.validated(SelectConfig, keep=keep, top=top, text=text, shard_size=shard_size, **ranked)
    marked = None if marks is None else Artifact.open(marks)
    found = _scores(scores)
    raise typer.Exit(select_step(found, shards, f"{out.rstrip('/')}/shards", config, marked, workers, fresh))


def _scores(named: str | None) -> Artifact:
    """The scores to select by: those that were named. This is where missing ones are to be computed."""
    if named is None:
        raise BadInput("--scores: name the scores of an earlier run")
    return Artifact.open(named)


def select_step(
    scores: Artifact,
    shards: str,
    out: str,
    config: SelectConfig,
    marks: Artifact | None = None,
    workers: int | None = None,
    fresh: bool = False,
) -> Exit:
    """Select from ``shards`` by their scores into the artifact ``out``; its report and uid list come last.

    Loads no model. Raises CapipeError before anything is written where the input cannot be used.
    """
    from .filter_report import write_filter_report
    from .selecting import execute_select, plan_select, write_uids

    plan = plan_select(scores, shards, out, config, marks=marks, workers=workers, fresh=fresh)
    print(plan.found.line(), file=sys.stderr)
    if warning := plan.found.warning():
        print(f"warning: {warning}", file=sys.stderr)
    stop = threading.Event()
    before = sum(task.rows for task in plan.tasks) - sum(task.rows for task in plan.todo)
    done = len(plan.tasks) - len(plan.todo)
    progress = Progress("select", len(plan.tasks), done, sum(plan.found.sizes), before, ready=time.monotonic())
    try:
        with progress.shown(Console(stderr=True)) as report, interrupts(stop.set):
            outcome = execute_select(plan, report, stop)
        if len(plan.artifact.committed()) == len(plan.tasks):
            print(f"report: {write_filter_report(plan.artifact, plan.found.rule, plan.shards)}", file=sys.stderr)
            write_uids(plan.artifact)
    finally:
        plan.artifact.close()
    return conclude(out, outcome.interrupted, progress.finished_line())
