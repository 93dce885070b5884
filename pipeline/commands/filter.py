"""`capipe filter`: score, then select."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.sharing.claims import alone
from ...terminal import print_err, print_line
from ..runners.interrupts import STOPPED
from ..runners.placement import Placement
from ..runners.pool_job import job_session
from ..runners.progress import Progress
from .options import shared as o
from .options.engine_choice import EngineChoice
from .options.groups import flattened
from .options.vlm import VlmOptions
from .run_job import Exit, conclude, run_job
from .sentences import COLUMNS, FOLDER, check_sentences, refuse_others

if TYPE_CHECKING:
    from ...manifests.withdrawal.uid_set import UidSet
    from ...stages.filter.select import SelectConfig
    from ..jobs.joined.sources import Chosen, Joined, Sources
    from ..jobs.score import ScoreSetup

EMPTY: Mapping[str, str] = {}


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
    sentences: VlmOptions
    safety: Annotated[bool, typer.Option("--safety", help="Also look for nudity (column unsafe); needs nudenet.")] = (
        False
    )
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Embeddings of `capipe embed` by the same --clip, in place of its vision encoder; for --safety, too."
        ),
    ] = None
    scores: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PLACE",
            help="What is scored already: by an earlier run, `capipe ask` or another stage, or in Parquet of your own "
            "with uid, or shard and key. May be repeated; NAME_ is put before its columns.",
        ),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(
            help="What to keep: a condition over the columns of all scores and --marks, e.g. 'clip_score > 0.28 and "
            '(itm_score_min >= 0.5 or language == "en")\'. A missing value keeps nothing.'
        ),
    ] = None
    top: Annotated[float | None, typer.Option(help="Fraction to keep of what --keep leaves, best first.")] = None
    by: Annotated[str | None, typer.Option(help="Column by which --top ranks; clip_score by default.")] = None
    text: Annotated[
        str,
        typer.Option(
            help="Caption to write: re (new), org (original), auto (new where there are any), none (images alone)."
        ),
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

    @property
    def checker(self) -> EngineChoice | None:
        """The model that checks sentences, if any."""
        scorer = self.scorer_options
        engine = o.EngineOptions(dtype=scorer.dtype, gpus=scorer.gpus, decode_workers=scorer.decode_workers)
        return self.sentences.choice(EngineChoice.of("", "auto", engine, self.run))


def check(options: FilterOptions) -> None:
    """Raise BadInput for options that do not go together. Does not access models or data.

    With --scores, an unknown column may be one of theirs: it is refused when they are opened.
    """
    from ...manifests.expressions.parser import UnknownColumn

    if options.by is not None and options.top is None:
        raise BadInput(f"--by {options.by}: ranks nothing without --top; give a fraction, e.g. --top 0.3")
    if options.embeddings is not None and options.clip is None:
        raise BadInput("--embeddings: they are the image side of a CLIP's scores; name it by --clip")
    models, checker = _models(options), options.checker
    if not models and checker is None and not options.scores:
        text = "name what is to score: --clip and --itm (tiny/clip, tiny/itm), --vlm, or --scores of an earlier run"
        raise BadInput(text)
    if checker is not None:
        checker.check()
    if models:
        options.scorer_options.check(options.run)
    options.run.check_runner(options.workers)
    options.run.refuse_taking_back(fresh=options.run.fresh)
    try:
        select_config(options, COLUMNS if checker is not None else EMPTY)
    except UnknownColumn:
        if not options.scores:
            raise


def select_config(options: FilterOptions, columns: Mapping[str, str] = EMPTY) -> SelectConfig:
    """The config for selection. ``columns``: those joined to the scores', with Arrow's names of their types.

    Raises UnknownColumn for a name in --keep or --by that is none, BadInput.
    """
    from ...stages.filter.select import Rule, SelectConfig

    ranked = {} if options.by is None else {"by": options.by}
    given = {"keep": options.keep, "top": options.top, "text": options.text, "shard_size": options.shard_size}
    config = o.validated(SelectConfig, **given, index=options.index, columns=dict(columns), **ranked)
    marked = Rule.of(config, "re").mark_columns
    if marked and options.marks is None:
        raise BadInput(f"--keep: {marked[0]} is a column of the marks of `capipe dedup`; name them with --marks")
    return config


def _models(options: FilterOptions) -> dict[str, str]:
    """The scorers named by the options, by kind."""
    named = {"clip": options.clip, "itm": options.itm}
    return {kind: model for kind, model in named.items() if model is not None}


@flattened
def filter_(options: FilterOptions) -> None:
    """Score captions and select rows by the scores: final shards, a row for every input row, and a report."""
    check(options)
    marks = None if options.marks is None else Artifact.open(options.marks)
    drop, out = o.dropped(options.drop), options.out.rstrip("/")
    plan = plan_scores(options, out, COLUMNS if options.checker is not None else EMPTY)
    if options.checker is not None:
        _sentences(options, f"{out}/{FOLDER}", drop)
        options = replace(options, scores=[*(options.scores or []), f"{out}/{FOLDER}"])
        plan = plan_scores(options, out)
    if options.dry_run:
        _preview(plan, options.shards, marks, drop)
        return
    if plan.makes:
        scored = score_step(options, plan.scores, drop)
        if scored is not Exit.OK:  # missing scores would be missing in the final shards
            raise typer.Exit(scored)
    scores = Artifact.open(plan.scores)
    joined = plan.joined(scores, options.shards, out, drop, options.run.share)
    if joined is None:
        print_err(STOPPED)
        raise typer.Exit(Exit.INTERRUPTED)
    run = options.run
    where = (scores, options.shards, f"{out}/shards", plan.config, marks, options.workers, run.fresh, drop, run, joined)
    raise typer.Exit(select_step(*where))


def _sentences(options: FilterOptions, out: str, drop: UidSet | None) -> None:
    """Check captions sentence by sentence into the artifact ``out``. Raises Exit if not all could be checked."""
    assert options.checker is not None
    if options.dry_run:
        if not Artifact.exists(out):
            raise BadInput(f"{out}: no sentences are checked yet, as --vlm asks; run it first, without --dry-run")
        return
    where = (options.shards, out, captions_beside(options), drop, options.retry)
    code = check_sentences(options.checker, options.sentences.config, *where)
    if code is not Exit.OK:  # as missing scores
        raise typer.Exit(code)


@dataclass(frozen=True)
class ScorePlan:
    """``scores``: place of the main scores, which this run ``makes`` or not; ``chosen``: columns of other sources."""

    scores: str
    makes: bool
    chosen: Chosen
    config: SelectConfig

    def joined(
        self, scores: Artifact, shards: str, folder: str, drop: UidSet | None, share: bool = False
    ) -> list[Joined] | None:
        """The other sources as sidecars; tables are joined in ``folder``. None if stopped."""
        from ..jobs.joined.tables import join_tables

        return join_tables(self.chosen, scores, shards, folder, drop, share)


def plan_scores(options: FilterOptions, out: str, columns: Mapping[str, str] = EMPTY) -> ScorePlan:
    """What is scored already, what this run scores, and which columns the selection has. Raises CapipeError.

    Opens artifacts and tables, and loads no model. ``columns``: those that this run will join, with their types.
    """
    from ...manifests.expressions.parser import names_in
    from ...stages.filter.joined import scored_columns
    from ..jobs.joined.sources import choose, joined_names, open_sources, refuse_other_captions

    sources = open_sources(options.scores or [])
    makes = scores_itself(options, sources)
    if makes:
        sources, place = sources.without_main(), f"{out}/scores"
        scored = scored_columns({"scorers": _models(options), "safety": options.safety})
        captions = None if options.captions is None else Artifact.open(options.captions).fingerprint
    else:
        assert sources.main is not None and sources.main.scores is not None
        place, captions = sources.main.place, sources.main.captions
        scored = joined_names(sources.main.scores)
    refuse_other_captions(captions, sources)
    if options.checker is not None and not makes:
        refuse_others(options.captions, captions, place)
    mentioned = names_in(options.keep or "") | {options.by or ""}
    chosen = choose(sources, mentioned, (place, scored), options.marks is not None)
    if twice := sorted({*chosen.types} & {*columns}):
        raise BadInput(f"--vlm: {twice[0]} is in what --scores names, too; leave one of them out")
    return ScorePlan(place, makes, chosen, select_config(options, {**chosen.types, **columns}))


def scores_itself(options: FilterOptions, sources: Sources) -> bool:
    """True if this run makes the main scores, of captions alone if no model is named.

    Raises BadInput if a model's scores are there already, or if no captions to write are named.
    """
    scorers, named = sources.scorers, [*_models(options), *(["safety"] if options.safety else [])]
    for kind in named:
        if kind in scorers:
            text = f"--scores {scorers[kind]}: scored already by --{kind}; leave that out"
            raise BadInput(f"{text}, or write --scores NAME={scorers[kind]} to have both")
    if named:
        return True
    if sources.main is not None:
        if options.captions is not None and options.checker is None:
            text = f"--captions {options.captions}: those of --scores {sources.main.place} are scored already"
            raise BadInput(f"{text} and will be written; leave it out, or name what is to score")
        return False
    named_scores = next((one for one in sources.others if one.scores is not None), None)
    if named_scores is not None and options.captions is None:
        text = f"--scores {named_scores.name}={named_scores.place}: scores with a name give no captions to write"
        raise BadInput(f"{text}; give some without a name, or --captions")
    return True


def _preview(plan: ScorePlan, shards: str, marks: Artifact | None, drop: UidSet | None) -> None:
    """Print a selection's plan. Raises BadInput if there are no scores yet: they are not made here."""
    from ..jobs.select import preview_select

    if not Artifact.exists(plan.scores):
        text = f"{plan.scores}: no scores yet, by which --dry-run would select"
        raise BadInput(f"{text}; score first, without --dry-run")
    scores = Artifact.open(plan.scores)
    with tempfile.TemporaryDirectory() as folder:  # for tables, which a selection joins in its --out
        joined = plan.joined(scores, shards, folder, drop)
        if joined is None:
            raise typer.Exit(Exit.INTERRUPTED)
        selection, costs = preview_select(scores, shards, plan.config, marks, drop, joined)
    for line in (selection.line(), *selection.missing_lines(), costs.line()):
        print_line(line)


def score_setup(options: FilterOptions, place: Placement) -> ScoreSetup:
    """The scorers named by the options, by kind."""
    from ...models.scorers.loading import ScorerConfig
    from ..jobs.score import ScoreSetup

    scorer = options.scorer_options
    scorers = tuple(ScorerConfig(kind, model, scorer.dtype) for kind, model in _models(options).items())
    return ScoreSetup(scorers, scorer.decoders(place), options.safety)


def score_step(options: FilterOptions, out: str, drop: UidSet | None = None) -> Exit:
    """Score the captions of the shards and of the annotate artifact joined with them into the artifact ``out``.

    Loads no model if everything is scored. Scores by other models, or of other captions, are refused and not replaced.
    """
    from ...manifests.schema import SCORE
    from ...stages.filter.score import EMBEDDINGS, passed_on
    from ..jobs.rows.engine import plan
    from ..jobs.score import ScoreStage, with_embeddings
    from ..jobs.withdraw import withdraw

    placement = options.run.placement("", options.scorer_options.gpus)
    beside = captions_beside(options)
    setup = score_setup(options, placement)
    if options.embeddings is not None:
        beside[EMBEDDINGS] = Artifact.open(options.embeddings)
        setup = with_embeddings(setup, beside[EMBEDDINGS])
    stage = ScoreStage(setup)
    job = plan(stage, options.shards, out, beside=beside, retry=options.retry, share=options.run.share)
    if withdraw(job.artifact, drop, SCORE, passed_on) is None:
        return Exit.INTERRUPTED
    return run_job(job, placement)


def captions_beside(options: FilterOptions) -> dict[str, Artifact]:
    """The new captions by their name in a row's ``beside``; empty without any. Raises BadInput."""
    from ...stages.filter.score import CAPTIONS

    if options.captions is None:
        return {}
    captions = Artifact.open(options.captions)
    if captions.stage != "annotate":
        text = f"{options.captions}: an artifact of stage {captions.stage!r}"
        raise BadInput(f"{text}; --captions takes one of `capipe annotate`")
    return {CAPTIONS: captions}


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
    joined: Sequence[Joined] = (),
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
        joined=joined,
        drop=drop,
        workers=workers,
        fresh=fresh,
        share=run.share,
        cluster=run.cluster_of_tasks(),
    )
    for name in (REPORT, UIDS) if plan.todo else ():  # older than the shards from now on
        plan.artifact.folder.remove(name)
    print_err(plan.selection.line())
    for missing in plan.selection.missing_lines():
        print_err(missing)
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
