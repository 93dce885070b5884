"""`capipe filter`: score, then select."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...terminal import print_err
from ..runners.placement import Placement
from ..runners.pool_job import job_session
from ..runners.progress import Progress
from . import options as o
from .run_job import Exit, conclude, run_job

if TYPE_CHECKING:
    from ...stages.filter.select import SelectConfig
    from ..jobs.score import ScoreSetup


def filter_(
    shards: o.Shards,
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL): scores go to scores/, tars to shards/.")],
    captions: Annotated[
        str | None, typer.Option(help="Artifact of `capipe annotate`; without it the tars' own texts are scored.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, or a hub id.")
    ] = None,
    itm: Annotated[
        str | None, typer.Option(help="BLIP or BLIP-2 for image-text matching: tiny/itm, a folder or a hub id.")
    ] = None,
    safety: Annotated[
        bool, typer.Option("--safety", help="Also look for nudity (column unsafe); needs nudenet.")
    ] = False,
    scores: Annotated[str | None, typer.Option(help="Scores of an earlier run, instead of any models.")] = None,
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
    dtype: o.Dtype = "auto",
    gpus: o.Gpus = None,
    decode_workers: o.DecodeWorkers = None,
    retry: o.Retry = False,
    runner: o.Runner = "local",
    ray_address: o.RayAddress = None,
    ray_workers: o.RayWorkers = None,
    share: o.Share = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Write the final shards anew; scores stay.")] = False,
) -> None:
    """Keep what the scores believe: final shards, with a row for every input row, and a report with pictures."""
    from ...stages.filter.select import SelectConfig

    if by is not None and top is None:
        raise BadInput(f"--by {by}: ranks nothing without --top; give a fraction, e.g. --top 0.3")
    ranked = {} if by is None else {"by": by}
    config = o.validated(SelectConfig, keep=keep, top=top, text=text, shard_size=shard_size, **ranked)
    marked = None if marks is None else Artifact.open(marks)
    models = {kind: model for kind, model in (("clip", clip), ("itm", itm)) if model is not None}
    scored = Exit.OK
    if scores is None:
        place = o.placement("", gpus, runner, ray_address, ray_workers)
        setup = score_setup(models, safety, dtype, decode_workers, place)
        scores = f"{out.rstrip('/')}/scores"
        scored = score_step(setup, shards, scores, captions, place, retry, share)
        if scored is not Exit.OK:  # what is missing would be missing in the final shards
            raise typer.Exit(scored)
        if share:  # selecting is one process's, and takes seconds
            print_err(f"scored; to select: the same command without --share, or with --scores {scores}")
            raise typer.Exit(scored)
    elif models or captions is not None or safety:
        raise BadInput("--scores: these are scored already; leave out --captions, --clip, --itm and --safety")
    final = f"{out.rstrip('/')}/shards"
    raise typer.Exit(select_step(Artifact.open(scores), shards, final, config, marked, workers, fresh))


def score_setup(
    models: Mapping[str, str], safety: bool, dtype: str, decode_workers: int | None, place: Placement
) -> ScoreSetup:
    """The scorers as options name them, by kind. Raises BadInput where there is none."""
    from ...models.scorers.loading import ScorerConfig
    from ..jobs.score import ScoreSetup

    if not models:
        raise BadInput("name what is to score: --clip and --itm (tiny/clip, tiny/itm), or --scores of an earlier run")
    scorers = tuple(ScorerConfig(kind, model, dtype) for kind, model in models.items())
    return ScoreSetup(scorers, decode_workers or o.default_decode_workers(len(place.gpus)), safety)


def score_step(
    setup: ScoreSetup,
    shards: str,
    out: str,
    captions: str | None,
    place: Placement,
    retry: bool,
    share: bool = False,
) -> Exit:
    """Score what ``shards`` (and the annotate artifact ``captions``) hold into the artifact ``out``.

    Loads no model where all is scored. Scores by other models, or of other captions, are refused and not replaced.
    """
    from ...stages.filter.score import CAPTIONS
    from ..jobs.engine import plan
    from ..jobs.score import ScoreStage

    beside = {}
    if captions is not None:
        beside[CAPTIONS] = Artifact.open(captions)
        if beside[CAPTIONS].stage != "annotate":
            stage = beside[CAPTIONS].stage
            raise BadInput(f"{captions}: an artifact of stage {stage!r}; --captions takes one of `capipe annotate`")
    return run_job(plan(ScoreStage(setup), shards, out, beside=beside, retry=retry, share=share), place)


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
    from ..jobs.select import execute_select, plan_select, write_uids
    from ..report.filter import write_filter_report

    plan = plan_select(scores, shards, out, config, marks=marks, workers=workers, fresh=fresh)
    print_err(plan.selection.line())
    if warning := plan.selection.warning():
        print_err(f"warning: {warning}")
    before = sum(task.rows for task in plan.tasks) - sum(task.rows for task in plan.todo)
    done = len(plan.tasks) - len(plan.todo)
    progress = Progress("select", len(plan.tasks), done, sum(plan.selection.sizes), before, ready=time.monotonic())
    try:
        with job_session(progress) as (report, stop):
            outcome = execute_select(plan, report, stop)
        if len(plan.artifact.committed()) == len(plan.tasks):
            print_err(f"report: {write_filter_report(plan.artifact, plan.selection.rule, plan.shards)}")
            write_uids(plan.artifact)
    finally:
        plan.artifact.close()
    return conclude(out, outcome.interrupted, progress.finished_line())
