"""`capipe embed`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o
from .outcome import run_plan


def embed(
    shards: o.Shards,
    out: o.Out,
    clip: Annotated[str, typer.Option(help="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, or a hub id.")],
    dtype: o.Dtype = "auto",
    gpus: o.Gpus = None,
    decode_workers: o.DecodeWorkers = None,
    retry: o.Retry = False,
    fresh: o.Fresh = False,
) -> None:
    """Image embeddings by a CLIP, one row for every row in: for `capipe dedup --embeddings`, and whoever needs them."""
    from ..models.scorers import ScorerConfig
    from .engine_stages import plan
    from .scoring import EmbedStage, ScoreSetup

    devices = o.devices_for("", gpus)
    workers = decode_workers or o.default_decode_workers(len(devices))
    setup = ScoreSetup((ScorerConfig("clip", clip, dtype),), workers)
    raise typer.Exit(run_plan(plan(EmbedStage(setup), shards, out, fresh=fresh, retry=retry), devices))
