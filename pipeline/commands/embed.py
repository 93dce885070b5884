"""`capipe embed`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o
from .run_job import run_job


def embed(
    shards: o.Shards,
    out: o.Out,
    clip: Annotated[str, typer.Option(help="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, or a hub id.")],
    dtype: o.Dtype = "auto",
    gpus: o.Gpus = None,
    decode_workers: o.DecodeWorkers = None,
    retry: o.Retry = False,
    runner: o.Runner = "local",
    ray_address: o.RayAddress = None,
    ray_workers: o.RayWorkers = None,
    share: o.Share = False,
    fresh: o.Fresh = False,
) -> None:
    """Image embeddings by a CLIP, one row for every row in: for `capipe dedup --embeddings`, and whoever needs them."""
    from ...models.scorers.loading import ScorerConfig
    from ..jobs.engine import plan
    from ..jobs.score import EmbedStage, ScoreSetup

    place = o.placement("", gpus, runner, ray_address, ray_workers)
    workers = decode_workers or o.default_decode_workers(len(place.gpus))
    setup = ScoreSetup((ScorerConfig("clip", clip, dtype),), workers)
    made = plan(EmbedStage(setup), shards, out, fresh=fresh, retry=retry, share=share)
    raise typer.Exit(run_job(made, place))
