"""`capipe eval`: metrics of captions graded by a reader; and `capipe compare`: comparison of two such runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ...errors import BadInput
from ...terminal import print_err, print_line
from ..jobs.artifacts import captions_artifact, question_artifact, refuse_controls
from .options import shared as o
from .options.engine_choice import EngineChoice
from .options.groups import flattened, settings
from .options.vlm import VlmOptions
from .run_job import Exit, run_job

if TYPE_CHECKING:
    from ...manifests.artifact import Artifact
    from ...stages.annotate.captioner import AnnotateConfig
    from ...stages.questions.grade import GradeConfig
    from ...trainer.evaluation.results import Caution, Comparison, EvaluationReport
    from ..jobs.rows.sentences import CheckStage

CAPTIONED, GRADED, CHECKED = "captions", "graded", "checked"  # the artifacts in --out; the report is beside them


@dataclass(frozen=True, kw_only=True)
class CaptionerSampling(o.SamplingOptions):
    """Sampling options for the captions to evaluate."""

    temperature: Annotated[float, typer.Option(help="Of the captioner; 0 is greedy.")] = 1.0


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `capipe eval`."""

    shards: o.Shards
    questions: Annotated[str, typer.Option(help="Folder of `capipe qa`, or an artifact of questions.")]
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) for captions, grades and the report.")]
    reader: Annotated[
        str, typer.Option(help="Model that answers from captions: tiny/holdout-reader, a folder or an id.")
    ]
    model: Annotated[str | None, typer.Option(help="Captioner to evaluate; or give --captions.")] = None
    captions: Annotated[str | None, typer.Option(help="Artifact of captions made before.")] = None
    engine: o.EngineName = "auto"
    reader_engine: Annotated[str | None, typer.Option(help="The reader's; the captioner's kind by default.")] = None
    asking: o.PromptOptions
    samples: Annotated[int, typer.Option(help="Captions per prompt and image (k).")] = 4
    sampling: CaptionerSampling
    decoding: o.DecodingOptions
    reading: o.ReaderOptions
    reader_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For the reader, in place of the captioner's: gpu-memory=0.4, dtype=…, template.KEY=…, or vLLM's; "
            "may be repeated.",
        ),
    ] = None
    sentences: VlmOptions
    generic: Annotated[str | None, typer.Option(help="A caption that fits any image, to be graded as a floor.")] = None
    words: Annotated[
        list[int] | None,
        typer.Option(help="Grade each caption cut at so many words, too: a curve over budgets; may be repeated."),
    ] = None
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP for recall at 1, 5 and 10; one that was neither reward nor filter: tiny/eval-clip."),
    ] = None
    cosine: Annotated[
        str | None, typer.Option(help="CLIP or BLIP for the mean cosine of captions and images; may be the reward's.")
    ] = None
    language_model: Annotated[str | None, typer.Option(help="Model for the captions' perplexity: tiny/opt.")] = None
    controls: Annotated[
        bool, typer.Option(help="Grade blind, empty, generic, self-oracle and oracle captions, too.")
    ] = True
    engine_options: o.EngineOptions
    marks: o.Marks = None
    retry: o.Retry = False
    run: o.RunOptions

    @property
    def captioner(self) -> EngineChoice:
        """The captioning model; its name is empty if captions already exist."""
        return EngineChoice.of(self.model or "", self.engine, self.engine_options, self.run)

    @property
    def grader(self) -> EngineChoice:
        """The model that answers the questions."""
        option, values = "--reader-arg", self.reader_arg
        return self.captioner.second(self.reader, self.reader_engine, option, values, same=False, sees=False)

    @property
    def checker(self) -> EngineChoice | None:
        """The model that checks sentences, if any."""
        return self.sentences.choice(self.captioner)


@dataclass(frozen=True)
class EvalConfigs:
    """Configs of both stages."""

    annotate: AnnotateConfig
    grade: GradeConfig


def check(options: EvalOptions) -> EvalConfigs:
    """Configs of both stages, with the prompts for a chat model.

    Does not access the models or the data. Raises BadInput.
    """
    from ...stages.annotate.captioner import AnnotateConfig
    from ...stages.questions.grade import GradeConfig
    from ..jobs.rows.prompts import parse_prompts

    if (options.model is None) == (options.captions is None):
        raise BadInput("give either --model, a captioner to evaluate, or --captions, what one has written")
    if options.captions is not None and options.marks is not None:
        raise BadInput("--marks: these captions are there already; leave it out")
    if options.model is None:
        options.captioner.refuse_own("--captions has no captioner: give it to the reader, by --reader-arg")
    options.grader.check()
    if (checker := options.checker) is not None:
        checker.check()
    chosen = parse_prompts(options.asking.prompt, options.asking.fallback_prompt)
    refuse_controls([prompt.name for prompt in chosen.prompts])
    annotate = o.validated(
        AnnotateConfig,
        **chosen.settings(options.asking.field_bytes),
        samples=options.samples,
        max_attempts=1,  # the captioner's first output is measured
        **settings(options.sampling),
        **settings(options.decoding),
    )
    if options.model is not None:
        options.captioner.check(annotate.sampling)
    generic = {} if options.generic is None else {"generic": options.generic}
    presentations = options.reading.presentations
    words = tuple(options.words or ())
    grade = o.validated(GradeConfig, presentations=presentations, controls=options.controls, words=words, **generic)
    return EvalConfigs(annotate, grade)


@flattened
def evaluate(options: EvalOptions) -> None:
    """Measure a captioner by how well a reader answers quiz questions from its captions alone."""
    from ...manifests.artifact import Artifact
    from ...models.engines.context import quiz_room
    from ...models.reader import ReaderConfig
    from ...stages.questions import grade, screen
    from ..jobs.grade import GradeStage, answer_tokens
    from ..jobs.rows.engine import plan
    from ..jobs.rows.prompts import chosen_prompts
    from ..jobs.rows.reader_checks import (
        asked_of,
        caption_texts,
        check_captions,
        check_limit,
        opened_of,
        oracle_texts,
        rewarded_by,
    )

    config = check(options)
    questions = question_artifact(options.questions)
    check_measures(options)
    checking = sentence_stage(options, config.grade)
    asking = options.asking
    chosen = chosen_prompts(asking.prompt, asking.fallback_prompt, options.model, options.engine)
    captioning = config.annotate.model_copy(update=chosen.settings(asking.field_bytes))
    placement = options.grader.placement()
    mode = options.reading.reader_mode or "choose"
    captions = None if options.captions is None else captions_artifact(options.captions)
    longest = (
        captioning.max_tokens if captions is None else captions.setting("semantic", "annotate", "max_tokens", kind=int)
    )
    style = options.reading.reader_prompt
    reads = ReaderConfig(presentations=config.grade.presentations, mode=mode, prompt=style)
    in_words = has_open_ended(questions)
    setup = options.grader.setup(placement, quiz_room(longest, answer_tokens(reads, in_words)))
    opened = opened_of(questions) if in_words else ()
    asked = asked_of(questions)
    grading = GradeStage(config.grade, setup, mode, asked, prompt=style, open_ended=in_words, opened=opened)
    codes = [Exit.OK]
    if captions is None:
        check_limit(grading, captioning.max_tokens)
        for line in chosen.lines():
            print_err(line)
        code, captions = caption(options, captioning)
        codes.append(code)
    lengths = check_captions(
        grading, chain(caption_texts(captions), oracle_texts(questions) if options.controls else ())
    )
    warnings = [*lengths.cautions, *rewarded_by(captions, grading)]
    say_warnings(warnings)
    graded = f"{options.out.rstrip('/')}/{GRADED}"
    grading = grading.with_room(lengths.longest)
    beside = {screen.QUESTIONS: questions, grade.CAPTIONS: captions}
    job = plan(grading, options.shards, graded, beside=beside, **options.run.plan_options(options.retry))
    codes.append(finished(run_job(job, placement)))
    if checking is not None:
        codes.append(finished(check_sentences(options, checking, captions)))
    if Artifact.open(graded).committed():  # otherwise the reason why no shard was graded has been printed
        report(options, graded, warnings)
    raise typer.Exit(max(codes))


def has_open_ended(questions: Artifact) -> bool:
    """Whether the questions were imported with open-ended ones."""
    return questions.config["semantic"].get("open_ended") is True


def finished(code: Exit) -> Exit:
    """The code of a step that was not interrupted. Raises Exit for one that was."""
    if code is Exit.INTERRUPTED:
        raise typer.Exit(code)
    return code


def sentence_stage(options: EvalOptions, config: GradeConfig) -> CheckStage | None:
    """The stage that checks captions sentence by sentence; None if no model for that is named.

    Raises BadInput if the model cannot be used; a server may still be started while captions are written.
    """
    from ...stages.questions.check import CheckConfig
    from ..jobs.rows.sentences import CheckStage, sentence_room

    if (checker := options.checker) is None:
        return None
    asks = options.sentences.config
    setup = checker.setup(checker.placement(), sentence_room(asks))
    stage = CheckStage(CheckConfig(reader=asks, controls=config), setup)
    if not setup.engine.is_http:
        stage.semantic()
    return stage


def check_sentences(options: EvalOptions, stage: CheckStage, captions: Artifact) -> Exit:
    """Check the captions sentence by sentence."""
    from ...stages.questions.grade import CAPTIONS
    from ..jobs.rows.engine import plan

    assert options.checker is not None
    runs = options.run.plan_options(options.retry)
    job = plan(stage, options.shards, f"{options.out.rstrip('/')}/{CHECKED}", beside={CAPTIONS: captions}, **runs)
    return run_job(job, options.checker.placement())


def report(options: EvalOptions, graded: str, warnings: Sequence[Caution]) -> None:
    """Compute the metrics; write and show them."""
    from ...manifests.artifact import Artifact
    from ..jobs.eval import EvaluationModels, report_on, write_report

    models = EvaluationModels(options.clip, options.cosine, options.language_model)
    checked = None if options.checker is None else Artifact.open(f"{options.out.rstrip('/')}/{CHECKED}")
    figures = report_on(Artifact.open(graded), models, warnings, checked)
    write_report(figures, options.out)
    show(figures)
    say_warnings(figures.warnings)
    print_line(f"report: {options.out.rstrip('/')}/report.md")


def check_measures(options: EvalOptions) -> None:
    """Raise BadInput early, before captioning, if a model used only for the final metrics is not available."""
    from ...models.scorers.clip_source import clip_place
    from ...models.scorers.lm_scores import load_text_scorer
    from ..jobs.eval import load_cosine

    if options.clip is not None:
        clip_place(options.clip)
    if options.cosine is not None:
        load_cosine(options.cosine)
    if options.language_model is not None:
        load_text_scorer(options.language_model)


def caption(options: EvalOptions, config: AnnotateConfig) -> tuple[Exit, Artifact]:
    """Write the captions to grade. Raises Exit if interrupted."""
    from ..jobs.annotate import AnnotateStage
    from ..jobs.artifacts import marks_beside
    from ..jobs.rows.engine import plan
    from ..jobs.rows.prompts import check_longest
    from .annotate import say_fallbacks

    captioner = options.captioner
    placement = captioner.placement()
    setup = captioner.setup(placement, config.room, sampling=config.sampling)
    check_longest(config, setup.engine)
    stage = AnnotateStage(config, setup, captioner.model)
    out = f"{options.out.rstrip('/')}/{CAPTIONED}"
    beside, runs = marks_beside(options.marks), options.run.plan_options(options.retry)
    code = run_job(plan(stage, options.shards, out, beside=beside, **runs), placement)
    if code is Exit.INTERRUPTED:
        raise typer.Exit(code)
    say_fallbacks(out)
    return code, captions_artifact(out)


def compare(
    first: Annotated[str, typer.Argument(help="Folder (or URL) of a `capipe eval`.")],
    second: Annotated[str, typer.Argument(help="Folder of another one, on the same questions with the same reader.")],
    first_system: Annotated[
        str | None, typer.Option(help="Prompt (or control) of the first; its first prompt.")
    ] = None,
    second_system: Annotated[str | None, typer.Option(help="The same of the second.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder for comparison.md and comparison.json.")] = None,
) -> None:
    """Compare two evaluations: the difference in quiz accuracy, by a paired bootstrap over images."""
    from ...trainer.evaluation.compare import compare as compared
    from ..jobs.eval import run_of, write_report

    comparison = compared(run_of(first, GRADED, first_system), run_of(second, GRADED, second_system))
    show(comparison)
    if out is not None:
        write_report(comparison, out, "comparison")
        print_line(f"comparison: {out.rstrip('/')}/comparison.md")


def show(value: EvaluationReport | Comparison) -> None:
    """Print the tables to stdout."""
    from ...trainer.evaluation.tables import terminal

    console = Console(soft_wrap=False)
    for table in terminal(value):
        console.print(table)


def say_warnings(warnings: Sequence[Caution]) -> None:
    """Print warnings to stderr, one line each."""
    for warning in warnings:
        print_err(f"warning: {warning.text}")
