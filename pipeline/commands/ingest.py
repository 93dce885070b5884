"""`capipe ingest`, and `capipe render`, which makes pictures to ingest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, get_args

import typer

from ...errors import BadInput
from ...models.tiny.world.scenes import Split
from ...terminal import print_line
from .options import Fresh, Out, validated
from .run_job import conclude


def render(
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures, their alt texts and their truth.")],
    images: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 400,
    split: Annotated[str, typer.Option(help="Whose scenes: train or heldout; no scene is in both.")] = "train",
    seed: Annotated[int, typer.Option(help="Source of every draw.")] = 0,
) -> None:
    """Render pictures of the bundled models' world, as a crawl would leave them: to try everything on."""
    from ...models.tiny.world.corpus import write_corpus

    write_corpus(out, images, known_split(split), seed)
    print_line(f"{images} pictures in {out}")


def known_split(name: str) -> Split:
    """Raises BadInput where there is no such one."""
    for split in get_args(Split):
        if name == split:
            return split  # type: ignore[no-any-return]
    raise BadInput(f"--split {name!r}: there are {' and '.join(get_args(Split))}")


def ingest(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of images, tars, tables (Parquet, CSV, JSON, JSONL), saved datasets, or "
            "hf://name[@revision][:split]."
        ),
    ],
    out: Out,
    shard_size: Annotated[int, typer.Option(help="Items per shard, usable or not.")] = 10_000,
    convert: Annotated[
        bool, typer.Option("--convert", help="Make PNGs of GIF, BMP, TIFF, ICO, JPEG 2000, AVIF and HEIF pictures.")
    ] = False,
    min_side: Annotated[int, typer.Option(help="Images with a shorter side of fewer pixels are too_small.")] = 16,
    max_image_pixels: Annotated[int, typer.Option(help="Larger images are too_large; they are not decoded.")] = 10**8,
    max_aspect: Annotated[float, typer.Option(help="Longest over shortest side; beyond it, unsupported.")] = 200.0,
    path_column: Annotated[
        str | None, typer.Option(help="Column of paths or images in tables, if it has no usual name.")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of captions in tables, datasets and .json sidecars; text, caption or txt by default."
        ),
    ] = None,
    image_folder: Annotated[
        str | None, typer.Option(help="Where the paths in tables begin; by default in the table's own folder.")
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(help="Extension of the one image of each key in tars: jpg, or 'jpg,png' for either.")
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(help="Folder that the paths in tables and datasets must lie in; then no URLs."),
    ] = None,
    public_only: Annotated[
        bool, typer.Option("--public-only", help="No URLs of private and loopback addresses in tables and datasets.")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Take what a folder's links and lists name outside of it as well.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; one per core by default.")] = None,
    fresh: Fresh = False,
) -> None:
    """Turn images from anywhere into checked, hashed shards; every file, member and table row becomes a row."""
    from ...stages.ingest.shard import IngestConfig
    from ..jobs.ingest import execute_ingest, plan_ingest
    from ..runners.pool_job import job_session
    from ..runners.progress import Progress

    config = validated(
        IngestConfig,
        shard_size=shard_size,
        convert=convert,
        min_side=min_side,
        max_image_pixels=max_image_pixels,
        max_aspect=max_aspect,
        path_column=path_column,
        image_key=image_key,
        text_column=text_column,
        image_folder=image_folder,
        within=within,
        public_only=public_only,
        follow_links=follow_links,
    )
    plan = plan_ingest(sources, out, config, workers=workers, fresh=fresh)
    progress = Progress("ingest", None, len(plan.artifact.committed()), ready=time.monotonic())
    try:
        with job_session(progress) as (report, stop):
            outcome = execute_ingest(plan, report, stop)
    finally:
        plan.artifact.close()
    raise typer.Exit(conclude(out, outcome.interrupted, progress.finished_line()))
