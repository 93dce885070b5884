"""`capipe ingest`, and `capipe render`, which makes images to ingest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ...errors import BadInput
from ...models.tiny.world.scenes import Split
from ...terminal import print_line
from .options.groups import flattened, settings
from .options.shared import Out, TaskOptions, local_path, validated
from .run_job import conclude

if TYPE_CHECKING:
    from ...stages.ingest.shard import IngestConfig


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Options of `capipe render`."""

    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for the images, their alt texts and their ground truth.", parser=local_path),
    ]
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 400
    split: Annotated[str, typer.Option(help="Split of scenes: train or heldout; no scene is in both.")] = "train"
    seed: Annotated[int, typer.Option(help="Seed of all sampling.")] = 0
    crowded: Annotated[
        float, typer.Option(min=0, max=1, help="Share of scenes with six to nine shapes; others have one to five.")
    ] = 0.0


def check_render(options: RenderOptions) -> Split:
    """The split of scenes to render. Raises BadInput if it does not exist."""
    for split in get_args(Split):
        if options.split == split:
            return split  # type: ignore[no-any-return]
    raise BadInput(f"--split {options.split!r}: there are {' and '.join(get_args(Split))}")


@flattened
def render(options: RenderOptions) -> None:
    """Render images of the bundled models' world, laid out like a crawl's, as input to try everything on."""
    from ...models.tiny.world.corpus import write_corpus

    write_corpus(options.out, options.images, check_render(options), options.seed, crowded=options.crowded)
    print_line(f"{options.images} pictures in {options.out}")


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Options for the contents of shards, named as in IngestConfig."""

    shard_size: Annotated[int, typer.Option(help="Items per shard, usable or not.")] = 10_000
    accept: Annotated[
        str | None,
        typer.Option(
            help="Take these, too, separated by commas: avif, gif, bmp, tiff, heic, jxl, jp2, ico, animated; or all."
        ),
    ] = None
    transcode: Annotated[
        str | None,
        typer.Option(help="Encode what --accept adds anew: as jpeg, webp or png; else bytes are kept."),
    ] = None
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of --transcode jpeg and webp; 95 by default.")
    ] = None
    min_side: Annotated[int, typer.Option(help="Images with a shorter side of fewer pixels are too_small.")] = 16
    max_image_pixels: Annotated[int, typer.Option(help="Larger images are too_large; they are not decoded.")] = 10**8
    max_aspect: Annotated[float, typer.Option(help="Longest over shortest side; beyond it, unsupported.")] = 200.0
    path_column: Annotated[
        str | None, typer.Option(help="Column of paths or images in tables, if it has no usual name.")
    ] = None
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of captions in tables, datasets and .json sidecars; text, caption or txt by default."
        ),
    ] = None
    image_folder: Annotated[
        str | None, typer.Option(help="Where the paths in tables begin; by default in the table's own folder.")
    ] = None
    image_key: Annotated[
        str | None, typer.Option(help="Extension of the one image of each key in tars: jpg, or 'jpg,png' for either.")
    ] = None
    within: Annotated[
        str | None,
        typer.Option(help="Folder that the paths in tables and datasets must lie in; then no URLs."),
    ] = None
    public_only: Annotated[
        bool, typer.Option("--public-only", help="No URLs of private and loopback addresses in tables and datasets.")
    ] = False
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Take what a folder's links and lists name outside of it as well.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """Options of `capipe ingest`."""

    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of images, tars, tables (Parquet, CSV, JSON, JSONL), saved datasets, or "
            "hf://name[@revision][:split]."
        ),
    ]
    out: Out
    sharding: ShardOptions
    convert: Annotated[bool, typer.Option("--convert", hidden=True)] = False
    run: TaskOptions


def check(options: IngestOptions) -> IngestConfig:
    """The stage's config. Does not access the data. Raises BadInput."""
    from ...stages.ingest.accept import accepted
    from ...stages.ingest.shard import IngestConfig

    options.run.check()
    if options.convert:
        raise BadInput("--convert: replaced by --accept all --transcode png, which also takes first frames")
    given = settings(options.sharding)
    return validated(IngestConfig, **{**given, "accept": accepted(options.sharding.accept)})


@flattened
def ingest(options: IngestOptions) -> None:
    """Turn images from anywhere into checked, hashed shards; every file, member and table row becomes a row."""
    from ..jobs.ingest import execute_ingest, plan_ingest
    from ..runners.pool_job import job_session
    from ..runners.progress import Progress

    config = check(options)
    run = options.run
    cluster = run.cluster_of_tasks()
    plan = plan_ingest(
        *(options.sources, options.out, config),
        workers=run.workers,
        fresh=run.fresh,
        share=run.share,
        cluster=cluster,
    )
    progress = Progress("ingest", None, len(plan.artifact.committed()), ready=time.monotonic())
    try:
        with job_session(progress) as (report, stop):
            outcome = execute_ingest(plan, report, stop)
    finally:
        plan.artifact.close()
    raise typer.Exit(conclude(options.out, outcome.interrupted, progress.finished_line()))
