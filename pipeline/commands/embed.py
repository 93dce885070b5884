"""`capipe embed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from . import options as o
from .option_groups import flattened
from .run_job import run_job


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Options of `capipe embed`."""

    shards: o.Shards
    out: o.Out
    clip: Annotated[str, typer.Option(help="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, or a hub id.")]
    scorer_options: o.ScorerOptions
    retry: o.Retry = False
    run: o.RunOptions


def check(options: EmbedOptions) -> None:
    """Check the options without access to model or data. Raises BadInput."""
    options.scorer_options.check(options.run)


@flattened
def embed(options: EmbedOptions) -> None:
    """Compute CLIP image embeddings, one row per input row, for `capipe dedup --embeddings` and other uses."""
    from ...models.scorers.loading import ScorerConfig
    from ..jobs.engine import plan
    from ..jobs.score import EmbedStage, ScoreSetup

    check(options)
    scorer = options.scorer_options
    placement = options.run.placement("", scorer.gpus)
    setup = ScoreSetup((ScorerConfig("clip", options.clip, scorer.dtype),), scorer.decoders(placement))
    job = plan(EmbedStage(setup), options.shards, options.out, **options.run.plan_options(options.retry))
    raise typer.Exit(run_job(job, placement))
