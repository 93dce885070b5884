"""`capipe export`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput
from ...terminal import print_err
from .options import shared as o
from .options.groups import flattened
from .run_job import conclude

if TYPE_CHECKING:
    from ...stages.export.card import CardWords


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `capipe export`."""

    artifact: Annotated[str, typer.Argument(help="Final shards, an index; or any artifact that has tars.")]
    out: o.Out
    format: Annotated[
        str, typer.Option(help="webdataset, parquet, lance, llava, folder, messages, or the import path of your own.")
    ] = "webdataset"
    license: Annotated[str, typer.Option(help="The Hub's identifier, such as cc-by-4.0; other by default.")] = "other"
    title: Annotated[str | None, typer.Option(help="Of the card; the name of --out by default.")] = None
    language: Annotated[
        list[str] | None,
        typer.Option(help="ISO 639 code for the card; by default what the scores found. May be repeated."),
    ] = None
    creator: Annotated[
        list[str] | None, typer.Option(help="Who made the dataset, for its citation. May be repeated.")
    ] = None
    published: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="Date, for its citation.")] = None
    image_extension: Annotated[
        str,
        typer.Option(help="webdataset: auto (one name for all images where theirs differ), keep, jpg, png or webp."),
    ] = "auto"
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Most pairs of a shard; by default the shards stay as they are.")
    ] = None
    transcode: Annotated[
        str | None,
        typer.Option(help="Encode images that not all readers decode anew, as jpeg, webp or png; else refused."),
    ] = None
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of --transcode jpeg and webp; 95 by default.")
    ] = None
    link: Annotated[
        bool, typer.Option("--link", help="webdataset: hard-link tars instead of copying. Never edit either side then.")
    ] = False
    append_captions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ARTIFACT",
            help="lance: captions by `capipe annotate` to add as columns NAME_…; images are not written again. May be "
            "repeated.",
        ),
    ] = None
    images: o.Images = None
    drop: o.Drop = None
    run: o.TaskOptions


def check(options: ExportOptions) -> CardWords:
    """User-provided fields of the card. Does not access the data. Raises BadInput, also for a bad format option."""
    from ...stages.export.card import CardWords
    from ...stages.export.formats import writer_class
    from ..jobs.export_images import check_encoding, check_extension

    options.run.check()
    writer_class(options.format, "--format").check()
    check_extension(options.image_extension)
    check_encoding(options.transcode, options.quality)
    title = options.title or options.out.rstrip("/").rpartition("/")[2]
    return CardWords(
        title,
        checked_license(options.license),
        checked_languages(options.language or []),
        tuple(options.creator or ()),
        checked_date(options.published),
    )


@flattened
def export(options: ExportOptions) -> None:
    """Write finished shards in formats that trainers read, with a dataset card; image bytes stay as they are."""
    from ..jobs.export import execute_export, finish, plan_export
    from ..jobs.export_images import check_encoding
    from ..runners.pool_job import job_session
    from ..runners.progress import Progress

    words, drop = check(options), o.dropped(options.drop)
    plan = plan_export(
        options.artifact,
        options.out,
        options.format,
        words,
        image_extension=options.image_extension,
        shard_size=options.shard_size,
        transcode=check_encoding(options.transcode, options.quality),
        quality=options.quality,
        link=options.link,
        images=options.images or (),
        drop=drop,
        captions=options.append_captions or (),
        workers=options.run.workers,
        fresh=options.run.fresh,
        share=options.run.share,
        cluster=options.run.cluster_of_tasks(),
    )
    done = plan.artifact.committed().values()
    before = sum(record.count for record in done)
    progress = Progress("export", plan.shards, len(done), plan.rows, before, ready=time.monotonic())
    try:
        with job_session(progress) as (report, stop):
            outcome = execute_export(plan, report, stop)
        for note in finish(plan, words) or []:
            print_err(note)
        if line := plan.withdrawal.line():
            print_err(line)
    finally:
        plan.artifact.close()
    raise typer.Exit(conclude(options.out, outcome.interrupted, progress.finished_line()))


def checked_license(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise BadInput(f"--license {name!r}: write the Hub's identifier in small letters, such as cc-by-4.0, or other")
    return name


def checked_date(text: str | None) -> str | None:
    try:
        return text and date.fromisoformat(text).isoformat()
    except ValueError:
        raise BadInput(f"--published {text!r}: write a date as YYYY-MM-DD") from None


def checked_languages(codes: list[str]) -> tuple[str, ...]:
    for code in codes:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            raise BadInput(f"--language {code!r}: write a code of two or three small letters, such as en")
    return tuple(codes)
