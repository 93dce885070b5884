"""`capipe embed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from .options import shared as o
from .options.groups import flattened
from .run_job import run_job


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Options of `capipe embed`."""

    shards: o.Shards
    out: o.Out
    clip: Annotated[str, typer.Option(help="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, or a hub id.")]
    safety: Annotated[
        bool, typer.Option("--safety", help="Also look for nudity (columns unsafe, unsafe_labels); needs nudenet.")
    ] = False
    marks: o.Marks = None
    scorer_options: o.ScorerOptions
    retry: o.Retry = False
    run: o.RunOptions


def check(options: EmbedOptions) -> None:
    """Check the options without access to model or data. Raises BadInput."""
    options.scorer_options.check(options.run)


@flattened
def embed(options: EmbedOptions) -> None:
    """Compute CLIP image embeddings, one row per input row, for `capipe dedup`, `capipe filter` and other uses."""
    from ...models.scorers.loading import ScorerConfig
    from ..jobs.artifacts import marks_beside
    from ..jobs.rows.engine import plan
    from ..jobs.score import EmbedStage, ScoreSetup

    check(options)
    scorer = options.scorer_options
    placement = options.run.placement("", scorer.gpus)
    clip = ScorerConfig("clip", options.clip, scorer.dtype)
    setup = ScoreSetup((clip,), scorer.decoders(placement), options.safety)
    runs, beside = options.run.plan_options(options.retry), marks_beside(options.marks)
    job = plan(EmbedStage(setup), options.shards, options.out, beside=beside, **runs)
    raise typer.Exit(run_job(job, placement))
