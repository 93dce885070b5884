"""`capipe qa`: writes or imports questions, then screens them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...errors import BadInput, CapipeError
from ...terminal import print_err
from ..jobs.artifacts import SCREENED, WRITTEN
from ..runners.placement import Placement
from .options import shared as o
from .options.engine_choice import EngineChoice
from .options.groups import flattened, settings
from .run_job import Exit, run_job

if TYPE_CHECKING:
    from ...stages.questions.screen import ScreenConfig
    from ...stages.questions.write import QuestionsConfig


@dataclass(frozen=True, kw_only=True)
class WriterSampling(o.SamplingOptions):
    """Sampling options for questions."""

    temperature: Annotated[float, typer.Option(help="Of the writer; 0 is greedy.")] = 0.7
    max_tokens: Annotated[int, typer.Option(help="Longest answer of the writer in tokens.")] = 2048
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides logits of the writer's tokens in prompt and answer; 1 is none.")
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class ScreenOptions:
    """Criteria for keeping questions."""

    screen: Annotated[
        str,
        typer.Option(
            help="strict (right in all orders with the image, in none without, not guessed either), caprl, or none."
        ),
    ] = "strict"
    with_image: Annotated[str | None, typer.Option(help="Bound on accuracy with the image, e.g. '>=1' or '>0.75'.")] = (
        None
    )
    without_image: Annotated[str | None, typer.Option(help="Bound on accuracy without it, e.g. '<=0' or '<0.25'.")] = (
        None
    )
    blind: Annotated[
        Literal["abstain", "guess", "both"] | None,
        typer.Option(
            help="Asked without the image: with the option to abstain, without it (a forced guess), or both; both if "
            "--screen is strict, guess if it is caprl, by default."
        ),
    ] = None
    guess_margin: Annotated[
        float | None, typer.Option(help="Share of forced guesses that may be right above chance; 0.25 if strict.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class QaOptions:
    """Options of `capipe qa`."""

    shards: o.Shards
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) for two artifacts: written and screened.")]
    model: Annotated[
        str | None, typer.Option(help="Model that writes: tiny/teacher, a folder, or a Hugging Face id.")
    ] = None
    import_: Annotated[
        str | None, typer.Option("--import", help="Take questions from this set (JSON, JSONL, Parquet, CSV) instead.")
    ] = None
    distractors: Annotated[
        int, typer.Option(help="--import: wrong options for open-ended questions, from the set's other answers.")
    ] = 0
    open_ended: Annotated[
        bool,
        typer.Option("--open-ended", help="--import: keep questions without options, for `capipe eval`; not screened."),
    ] = False
    engine: o.EngineName = "auto"
    screen_model: Annotated[str | None, typer.Option(help="Model that screens; the writer by default.")] = None
    screen_engine: Annotated[str | None, typer.Option(help="Its engine; the writer's kind by default.")] = None
    per_image: Annotated[int, typer.Option(help="Questions asked for per image.")] = 5
    absent: Annotated[
        int,
        typer.Option(
            help="Further questions per image about things that are not in it, answered no; named by the writer."
        ),
    ] = 0
    fewest: Annotated[int, typer.Option(help="Ask again while an image has fewer usable ones.")] = 1
    max_attempts: Annotated[int, typer.Option(help="Requests per image, the first included.")] = 3
    sampling: WriterSampling
    guided: Annotated[
        bool | None, typer.Option(help="Hold the writer to the JSON schema; by default where the engine can.")
    ] = None
    screening: ScreenOptions
    reader: o.ReaderOptions
    screen_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For the screening model, in place of the writer's: gpu-memory=0.4, max-pixels=…, template.KEY=…, or "
            "vLLM's; may be repeated.",
        ),
    ] = None
    engine_options: o.EngineOptions
    marks: o.Marks = None
    retry: o.Retry = False
    run: o.RunOptions

    @property
    def writer(self) -> EngineChoice:
        """The model that writes; its name is empty if questions are imported."""
        return EngineChoice.of(self.model or "", self.engine, self.engine_options, self.run)

    @property
    def screener(self) -> EngineChoice:
        """The model that screens, by default the writer."""
        model, same = self.screen_model or self.model or "", self.screen_model is None
        return self.writer.second(model, self.screen_engine, "--screen-arg", self.screen_arg, same=same, sees=True)


@dataclass(frozen=True)
class QaConfigs:
    """Configs of both stages; ``screen``: None without screening."""

    write: QuestionsConfig
    screen: ScreenConfig | None


def check(options: QaOptions) -> QaConfigs:
    """Configs of both stages. Does not access the models or the data. Raises BadInput."""
    from ...models.quiz import MOST_OPTIONS
    from ...stages.questions.write import QuestionsConfig

    screen = screen_config(options.screening, options.reader)
    if (options.model is None) == (options.import_ is None):
        raise BadInput("give either --model, who is to write the questions, or --import, a set to take them from")
    if screen is not None and options.model is None and options.screen_model is None:
        raise BadInput(
            "--screen-model: imported questions are screened by a model that sees; name one, or --screen none"
        )
    if screen is None and options.screen_arg:
        raise BadInput("--screen-arg: --screen none has nobody screen; leave one of them out")
    if options.model is None:
        options.writer.refuse_own("--import has no writer: give it to who screens, by --screen-arg")
    if screen is not None:
        options.screener.check()
    if options.import_ is not None and not 0 <= options.distractors < MOST_OPTIONS:
        most = MOST_OPTIONS - 1
        raise BadInput(
            f"--distractors {options.distractors}: 0 to leave open-ended questions alone, or up to {most} wrong options"
        )
    check_open_ended(options)
    if options.absent and options.model is None:
        raise BadInput(
            f"--absent {options.absent}: the writer names absent things, and --import has none; leave it out"
        )
    write = o.validated(
        QuestionsConfig,
        per_image=options.per_image,
        absent=options.absent,
        fewest=options.fewest,
        max_attempts=options.max_attempts,
        **settings(options.sampling),
    )
    if options.model is not None:
        options.writer.check(write.sampling)
    return QaConfigs(write, screen)


def check_open_ended(options: QaOptions) -> None:
    """Raise BadInput where open-ended questions cannot be kept."""
    if not options.open_ended:
        return
    if options.import_ is None:
        raise BadInput("--open-ended: a writer asks no such questions; leave it out, or give --import")
    if options.distractors:
        raise BadInput(f"--distractors {options.distractors}: makes options for open-ended questions; leave one out")
    if options.screening.screen != "none":
        raise BadInput("--open-ended: such questions are not screened; give --screen none")


@flattened
def qa(options: QaOptions) -> None:
    """Write quiz questions about every image, or import them, and keep those answerable only with the image."""
    from ...manifests.artifact import Artifact
    from ...stages.questions.screen import QUESTIONS
    from ..jobs.qa import ScreenStage
    from ..jobs.rows.engine import plan

    config = check(options)
    screener = options.screener
    if config.screen is not None:
        placement = screener.placement()
        setup = screener.setup(placement, config.screen.room)  # raises before anything is written
    written, screened = (f"{options.out.rstrip('/')}/{name}" for name in (WRITTEN, SCREENED))
    code = write_questions(options, config.write, written) if options.model else import_questions(options, written)
    if config.screen is None or code not in (Exit.OK, Exit.UNRESOLVED):
        raise typer.Exit(code)
    stage = ScreenStage(config.screen, setup, screener.model)
    beside = {QUESTIONS: Artifact.open(written)}
    job = plan(stage, options.shards, screened, beside=beside, **options.run.plan_options(options.retry))
    ended = run_job(job, placement)
    if ended is not Exit.INTERRUPTED:
        say_screening(screened)
    raise typer.Exit(max(code, ended))


def say_screening(out: str) -> None:
    """Print on stderr what each arm of screening refused."""
    from ...manifests.artifact import Artifact
    from ..inspect.screening import screening_lines

    try:
        lines = screening_lines(Artifact.open(out))
    except (OSError, ValueError, CapipeError) as error:  # everything is committed; `capipe verify` finds such errors
        lines = [f"warning: what screening refused was not counted: {error}"]
    for line in lines:
        print_err(line)


def write_questions(options: QaOptions, config: QuestionsConfig, out: str) -> Exit:
    """Write questions with a model into an artifact."""
    from ..jobs.artifacts import marks_beside
    from ..jobs.qa import QuestionsStage, engine_guides
    from ..jobs.rows.engine import plan

    placement = options.writer.placement()
    setup = options.writer.setup(placement, config.room, sampling=config.sampling)
    guided = engine_guides(setup.engine) if options.guided is None else options.guided
    stage = QuestionsStage(config, setup, options.writer.model, guided)
    beside, runs = marks_beside(options.marks), options.run.plan_options(options.retry)
    return run_job(plan(stage, options.shards, out, beside=beside, **runs), placement)


def import_questions(options: QaOptions, out: str) -> Exit:
    """Import a set into an artifact; records that match no image of the shards are listed beside it."""
    from ...manifests.files.storage import PRIVATE
    from ...manifests.shards import expand
    from ..jobs.artifacts import marks_beside
    from ..jobs.qa import ImportStage, unmatched_lines
    from ..jobs.rows.engine import plan

    assert options.import_ is not None
    inputs = tuple(expand(options.shards))
    stage = ImportStage(options.import_, inputs, options.distractors, options.sampling.seed, options.open_ended)
    refused = stage.refused()  # reads the whole set: its errors are found before anything is written
    strangers = stage.unmatched()
    runs = options.run.plan_options(options.retry)
    job = plan(stage, options.shards, out, beside=marks_beside(options.marks), also_read=[options.import_], **runs)
    job.artifact.folder.write(f"{PRIVATE}/unmatched.jsonl", unmatched_lines(strangers))
    if strangers:
        first = strangers[0]
        text = f"capipe: {first.where}: {first.reason} ({first.image!r}); {len(strangers)} such records are listed in "
        print_err(f"{text}{out}/{PRIVATE}/unmatched.jsonl, give --shards that hold their images")
    if refused is not None:
        print_err(f"capipe: {refused}")
    if options.marks is None and (several := stage.repeated()):
        print_err(
            f"capipe: {several} of the images with questions are in the shards several times, and each copy gets all "
            "their questions; `capipe dedup` marks the copies, --marks leaves them out"
        )
    return run_job(job, Placement())


def screen_config(options: ScreenOptions, reader: o.ReaderOptions) -> ScreenConfig | None:
    """The screening config for the options; None for no screening. Raises BadInput."""
    from ...stages.questions.screen import PRESETS

    if options.screen == "none":
        given = {
            "--reader-mode": reader.reader_mode is not None,
            "--reader-prompt": reader.reader_prompt != "own",
            "--blind": options.blind is not None,
            "--guess-margin": options.guess_margin is not None,
        }
        if unused := [option for option, is_given in given.items() if is_given]:
            raise BadInput(f"{unused[0]}: --screen none has nobody screen; leave one of them out")
        return None
    if options.screen not in PRESETS:
        raise BadInput(f"--screen {options.screen!r}: there are {', '.join(PRESETS)} and none")
    bounds: dict[str, Any] = {}
    if options.with_image is not None:
        bounds["image_min"], bounds["image_inclusive"] = o.parse_bound("--with-image", options.with_image, ">")
    if options.without_image is not None:
        bounds["text_max"], bounds["text_inclusive"] = o.parse_bound("--without-image", options.without_image, "<")
    config = PRESETS[options.screen]
    bounds |= _blind_arms(options, config)
    reads: dict[str, Any] = {"prompt": reader.reader_prompt}
    if reader.presentations is not None:
        if reader.presentations < 1:
            raise BadInput(f"--presentations {reader.presentations}: at least 1")
        reads["presentations"] = reader.presentations
    if reader.reader_mode is not None:
        reads["mode"] = reader.reader_mode
    return config.model_copy(update={**bounds, "reader": config.reader.model_copy(update=reads)})


def _blind_arms(options: ScreenOptions, preset: ScreenConfig) -> dict[str, Any]:
    """Settings of the arms without the image. Raises BadInput for one that no arm would use."""
    blind, margin = options.blind or preset.blind, options.guess_margin
    if margin is not None and blind == "abstain":
        raise BadInput(f"--guess-margin {margin}: nothing is guessed with --blind abstain; leave one of them out")
    if margin is not None and not 0 <= margin <= 1:
        raise BadInput(f"--guess-margin {margin}: a share from 0 to 1")
    if margin is None and blind != "abstain":
        margin = preset.guess_margin
    if options.without_image is not None and blind == "guess" and margin is not None:
        raise BadInput(
            f"--without-image {options.without_image!r}: forced guesses are bounded by --guess-margin, and there is no "
            "other arm; leave it out, or give --blind both"
        )
    return {"blind": blind, "guess_margin": margin}
