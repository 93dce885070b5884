"""`capipe annotate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput, CapipeError
from ...terminal import print_err
from .options import shared as o
from .options.engine_choice import EngineChoice
from .options.groups import flattened, settings
from .run_job import Exit, run_withdrawing

if TYPE_CHECKING:
    from ...stages.annotate.captioner import AnnotateConfig


@dataclass(frozen=True, kw_only=True)
class QualityGateOptions:
    """Thresholds for degenerate captions, named as in QualityGateConfig."""

    loop_repeats: Annotated[
        int, typer.Option(help="Copies in a row of a sentence that make a caption degenerate; short phrases need more.")
    ] = 4
    longest_run: Annotated[
        int, typer.Option(help="Longest accepted run of one character; rules and dot leaders may be 5 times as long.")
    ] = 40
    distinct_words: Annotated[
        float, typer.Option(help="Smallest accepted share of distinct words in a caption of 40 words or more.")
    ] = 0.15
    keep_truncated: Annotated[bool, typer.Option("--keep-truncated", help="Accept truncated captions.")] = False


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """Options of `capipe annotate`."""

    shards: o.Shards
    out: o.Out
    model: Annotated[str, typer.Option(help="tiny/captioner, a folder, or a Hugging Face id.")]
    engine: o.EngineName = "auto"
    asking: o.PromptOptions
    captions: Annotated[
        str | None, typer.Option(help="Captions of `capipe annotate` that {captions.NAME} in a prompt may name, too.")
    ] = None
    samples: Annotated[int, typer.Option(help="Captions per prompt and image.")] = 1
    system: Annotated[str | None, typer.Option(help="System message.")] = None
    sampling: o.SamplingOptions
    decoding: o.DecodingOptions
    max_attempts: Annotated[
        int, typer.Option(help="Attempts per caption that fails the quality gate, the first included.")
    ] = 3
    quality: QualityGateOptions
    engine_options: o.EngineOptions
    marks: o.Marks = None
    pack: Annotated[bool, typer.Option(help="Also write tars with the images (bytes as they came) and captions.")] = (
        False
    )
    drop: o.Drop = None
    retry: o.Retry = False
    trace: o.Trace = None
    run: o.RunOptions

    @property
    def captioner(self) -> EngineChoice:
        return EngineChoice.of(self.model, self.engine, self.engine_options, self.run)


def check(options: AnnotateOptions) -> AnnotateConfig:
    """The stage's config, with the prompts for a chat model.

    Does not access the model or the data. Raises BadInput.
    """
    from ...stages.annotate.captioner import AnnotateConfig
    from ...stages.annotate.quality_gate import QualityGateConfig
    from ..jobs.rows.prompts import parse_prompts, taken_from

    asking = options.asking
    chosen = parse_prompts(asking.prompt, asking.fallback_prompt, () if options.captions is None else None)
    if options.captions is not None and not taken_from(chosen.prompts):
        raise BadInput("--captions: no prompt takes {captions.NAME} of it; leave it out")
    config = o.validated(
        AnnotateConfig,
        **chosen.settings(asking.field_bytes),
        samples=options.samples,
        system=options.system,
        max_attempts=options.max_attempts,
        health=o.validated(QualityGateConfig, **settings(options.quality)),
        **settings(options.sampling),
        **settings(options.decoding),
    )
    options.captioner.check(config.sampling)
    return config


@flattened
def annotate(options: AnnotateOptions) -> None:
    """Caption every image of the shards; one row out for every row in, failures included."""
    from ...manifests.schema import ANNOTATE
    from ...stages.annotate.captioner import passed_on
    from ..jobs.annotate import AnnotateStage
    from ..jobs.artifacts import marks_beside
    from ..jobs.rows.engine import plan
    from ..jobs.rows.prompts import Given, check_longest, chosen_prompts

    config, drop = check(options), o.dropped(options.drop)
    given = Given.of(options.captions)
    asking, model, engine = options.asking, options.model, options.engine
    chosen = chosen_prompts(asking.prompt, asking.fallback_prompt, model, engine, options.system, given.names)
    settled = {**chosen.settings(asking.field_bytes), "given_tokens": given.tokens}
    config = config.model_copy(update=settled)
    placement = options.captioner.placement()
    setup = options.captioner.setup(placement, config.room, options.trace, config.sampling)
    check_longest(config, setup.engine)
    for note in chosen.lines():
        print_err(note)
    stage = AnnotateStage(config, setup, options.model, options.pack)
    beside = {**marks_beside(options.marks), **given.beside}
    job = plan(stage, options.shards, options.out, beside=beside, **options.run.plan_options(options.retry))
    code = run_withdrawing(job, placement, drop, ANNOTATE, passed_on)
    if code is not Exit.INTERRUPTED:
        say_fallbacks(options.out)
        if job.todo:
            _warn_of_shared(options.out)
    raise typer.Exit(code)


def say_fallbacks(out: str) -> None:
    """Print on stderr how many captions are by fallbacks of prompts with fields."""
    from ...manifests.artifact import Artifact
    from ..inspect.fallbacks import fallback_lines

    try:
        lines = fallback_lines(Artifact.open(out))
    except (OSError, ValueError, CapipeError) as error:  # everything is committed; `capipe verify` finds such errors
        lines = [f"warning: captions by fallbacks were not counted: {error}"]
    for line in lines:
        print_err(line)


def _warn_of_shared(out: str) -> None:
    """Warn on stderr if many images have the same caption."""
    from ...manifests.artifact import Artifact
    from ..inspect.shared_captions import warning

    try:
        shared = warning(Artifact.open(out))
    except (OSError, ValueError) as error:  # everything is committed; `capipe verify` finds such errors
        print_err(f"warning: captions that images share were not counted: {error}")
        return
    if shared is not None:
        advice = "look whether the model sees them, and whether a cache answers in its place"
        print_err(f"warning: {shared}; {advice}")
