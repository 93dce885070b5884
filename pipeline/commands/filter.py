"""`capipe filter`: score, then select."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.sharing.claims import alone
from ...terminal import print_err, print_line
from ..runners.placement import Placement
from ..runners.pool_job import job_session
from ..runners.progress import Progress
from .options import shared as o
from .options.groups import flattened
from .run_job import Exit, conclude, run_job

if TYPE_CHECKING:
    from ...manifests.withdrawal.uid_set import UidSet
    from ...stages.filter.select import SelectConfig
    from ..jobs.score import ScoreSetup


@dataclass(frozen=True, kw_only=True)
class FilterRunOptions(o.RunOptions):
    """Options for the placement of scoring, and for restarting the selection."""

    fresh: Annotated[bool, typer.Option("--fresh", help="Write the final shards anew; scores stay.")] = False


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Options of `capipe filter`."""

    shards: o.Shards
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL): scores go to scores/, tars to shards/.")]
    captions: Annotated[
        str | None, typer.Option(help="Artifact of `capipe annotate`; without it the tars' own texts are scored.")
    ] = None
    clip: Annotated[
        str | None, typer.Option(help="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, or a hub id.")
    ] = None
    itm: Annotated[
        str | None, typer.Option(help="BLIP or BLIP-2 for image-text matching: tiny/itm, a folder or a hub id.")
    ] = None
    safety: Annotated[bool, typer.Option("--safety", help="Also look for nudity (column unsafe); needs nudenet.")] = (
        False
    )
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Embeddings of `capipe embed` by the same --clip, in place of its vision encoder; for --safety, too."
        ),
    ] = None
    scores: Annotated[str | None, typer.Option(help="Scores of an earlier run, instead of any models.")] = None
    keep: Annotated[
        str | None,
        typer.Option(
            help="What to keep: a condition over the columns of scores and --marks, e.g. 'clip_score > 0.28 and "
            '(itm_score_min >= 0.5 or language == "en")\'. A missing value keeps nothing.'
        ),
    ] = None
    top: Annotated[float | None, typer.Option(help="Fraction to keep of what --keep leaves, best first.")] = None
    by: Annotated[str | None, typer.Option(help="Column by which --top ranks; clip_score by default.")] = None
    text: Annotated[
        str, typer.Option(help="Caption to write: re (new), org (original), auto (new where there are any).")
    ] = "auto"
    shard_size: Annotated[int, typer.Option(help="Kept rows per final shard; input shards stay whole.")] = 10_000
    index: Annotated[
        bool, typer.Option("--index", help="Copy no image: write rows alone, over the original tars, for `export`.")
    ] = False
    marks: o.Marks = None
    drop: o.Drop = None
    workers: Annotated[int | None, typer.Option(help="Processes that copy; one per core by default.")] = None
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be kept and its bytes, copied or as an index; write nothing."),
    ] = False
    scorer_options: o.ScorerOptions
    retry: o.Retry = False
    run: FilterRunOptions


def check(options: FilterOptions) -> SelectConfig:
    """The config for selection. Does not access models or data. Raises BadInput."""
    from ...stages.filter.select import Rule, SelectConfig

    if options.by is not None and options.top is None:
        raise BadInput(f"--by {options.by}: ranks nothing without --top; give a fraction, e.g. --top 0.3")
    models = options.clip is not None or options.itm is not None
    scored_from = models or options.captions is not None or options.embeddings is not None
    if options.scores is not None and (scored_from or options.safety):
        raise BadInput(
            "--scores: these are scored already; leave out --captions, --clip, --itm, --embeddings and --safety"
        )
    if options.embeddings is not None and options.clip is None:
        raise BadInput("--embeddings: they are the image side of a CLIP's scores; name it by --clip")
    if options.scores is None:
        if not models:
            raise BadInput(
                "name what is to score: --clip and --itm (tiny/clip, tiny/itm), or --scores of an earlier run"
            )
        options.scorer_options.check(options.run)
    ranked = {} if options.by is None else {"by": options.by}
    options.run.check_runner(options.workers)
    options.run.refuse_taking_back(fresh=options.run.fresh)
    given = {"keep": options.keep, "top": options.top, "text": options.text, "shard_size": options.shard_size}
    config = o.validated(SelectConfig, **given, index=options.index, **ranked)
    columns = Rule.of(config, "re").mark_columns
    if columns and options.marks is None:
        raise BadInput(f"--keep: {columns[0]} is a column of the marks of `capipe dedup`; name them with --marks")
    return config


@flattened
def filter_(options: FilterOptions) -> None:
    """Score captions and select rows by the scores: final shards, a row for every input row, and a report."""
    config = check(options)
    marks = None if options.marks is None else Artifact.open(options.marks)
    drop = o.dropped(options.drop)
    out, scores = options.out.rstrip("/"), options.scores
    if options.dry_run:
        _preview(scores or f"{out}/scores", options.shards, config, marks, drop)
        return
    if scores is None:
        scores = f"{out}/scores"
        scored = score_step(options, scores, drop)
        if scored is not Exit.OK:  # missing scores would be missing in the final shards
            raise typer.Exit(scored)
    artifact, final = Artifact.open(scores), f"{out}/shards"
    raise typer.Exit(
        select_step(
            artifact, options.shards, final, config, marks, options.workers, options.run.fresh, drop, options.run
        )
    )


def _preview(scores: str, shards: str, config: SelectConfig, marks: Artifact | None, drop: UidSet | None) -> None:
    """Print a selection's plan. Raises BadInput if there are no scores yet: they are not made here."""
    from ..jobs.select import preview_select

    if not Artifact.exists(scores):
        raise BadInput(f"{scores}: no scores yet, by which --dry-run would select; score first, without --dry-run")
    selection, costs = preview_select(Artifact.open(scores), shards, config, marks, drop)
    print_line(selection.line())
    print_line(costs.line())


def score_setup(options: FilterOptions, place: Placement) -> ScoreSetup:
    """The scorers named by the options, by kind."""
    from ...models.scorers.loading import ScorerConfig
    from ..jobs.score import ScoreSetup

    scorer = options.scorer_options
    named = (("clip", options.clip), ("itm", options.itm))
    scorers = tuple(ScorerConfig(kind, model, scorer.dtype) for kind, model in named if model is not None)
    return ScoreSetup(scorers, scorer.decoders(place), options.safety)


def score_step(options: FilterOptions, out: str, drop: UidSet | None = None) -> Exit:
    """Score the captions of the shards and of the annotate artifact joined with them into the artifact ``out``.

    Loads no model if everything is scored. Scores by other models, or of other captions, are refused and not replaced.
    """
    from ...manifests.schema import SCORE
    from ...stages.filter.score import CAPTIONS, EMBEDDINGS, passed_on
    from ..jobs.rows.engine import plan
    from ..jobs.score import ScoreStage, with_embeddings
    from ..jobs.withdraw import withdraw

    placement = options.run.placement("", options.scorer_options.gpus)
    beside = {}
    if options.captions is not None:
        captions = beside[CAPTIONS] = Artifact.open(options.captions)
        if captions.stage != "annotate":
            text = f"{options.captions}: an artifact of stage {captions.stage!r}"
            raise BadInput(f"{text}; --captions takes one of `capipe annotate`")
    setup = score_setup(options, placement)
    if options.embeddings is not None:
        beside[EMBEDDINGS] = Artifact.open(options.embeddings)
        setup = with_embeddings(setup, beside[EMBEDDINGS])
    stage = ScoreStage(setup)
    job = plan(stage, options.shards, out, beside=beside, retry=options.retry, share=options.run.share)
    if withdraw(job.artifact, drop, SCORE, passed_on) is None:
        return Exit.INTERRUPTED
    return run_job(job, placement)


def select_step(
    scores: Artifact,
    shards: str,
    out: str,
    config: SelectConfig,
    marks: Artifact | None = None,
    workers: int | None = None,
    fresh: bool = False,
    drop: UidSet | None = None,
    run: o.RunnerOptions | None = None,
) -> Exit:
    """Select from ``shards`` by their scores into the artifact ``out``; its report and uid list are written last.

    Loads no model. Raises CapipeError before anything is written if the input cannot be used.
    """
    from ..jobs.select import REPORT, UIDS, execute_select, plan_select, write_last
    from ..report.filter import filter_report

    run = run or o.RunnerOptions()
    plan = plan_select(
        *(scores, shards, out, config),
        marks=marks,
        drop=drop,
        workers=workers,
        fresh=fresh,
        share=run.share,
        cluster=run.cluster_of_tasks(),
    )
    for name in (REPORT, UIDS) if plan.todo else ():  # older than the shards from now on
        plan.artifact.folder.remove(name)
    print_err(plan.selection.line())
    print_err(plan.costs.line())
    if warning := plan.selection.warning():
        print_err(f"warning: {warning}")
    before = sum(task.rows for task in plan.tasks) - sum(task.rows for task in plan.todo)
    done = len(plan.tasks) - len(plan.todo)
    progress = Progress("select", len(plan.tasks), done, sum(plan.selection.sizes), before, ready=time.monotonic())
    try:
        with job_session(progress) as (report, stop):
            outcome = execute_select(plan, report, stop)
        if len(plan.artifact.committed()) == len(plan.tasks):
            with alone(plan.artifact.claims, "report"):
                write_last(plan.artifact, lambda: filter_report(plan.artifact, plan.selection.rule, plan.shards))
                print_err(f"report: {plan.artifact.url}/{REPORT}")
            plan.withdrawal.conclude()
            if line := plan.withdrawal.line():
                print_err(line)
    finally:
        plan.artifact.close()
    return conclude(out, outcome.interrupted, progress.finished_line())
