"""`capipe ask`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput, CapipeError
from ...stages.ask.questions import ALL, NAMED, parse_questions
from ...terminal import print_err
from .options import shared as o
from .options.engine_choice import EngineChoice
from .options.groups import flattened
from .run_job import Exit, run_withdrawing

if TYPE_CHECKING:
    from ...stages.ask.asker import AskConfig


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """Options of `capipe ask`."""

    shards: o.Shards
    out: o.Out
    model: Annotated[str, typer.Option(help="tiny/teacher, a folder, or a Hugging Face id.")]
    ask: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=QUESTION]",
            help="A question that yes or no answers, for the column ask_NAME: name='Is there …?', a bundled one "
            f"({', '.join(NAMED)}), or {ALL} of these; may be repeated.",
        ),
    ]
    engine: o.EngineName = "auto"
    reader_mode: o.ReaderMode = None
    presentations: Annotated[
        int | None, typer.Option(help="Orders of yes and no per question, 1 or 2; both by default.")
    ] = None
    samples: Annotated[int | None, typer.Option(help="--reader-mode sampled: answers in each order; 8 by default.")] = (
        None
    )
    temperature: Annotated[float | None, typer.Option(help="--reader-mode sampled: of the answers; 1 by default.")] = (
        None
    )
    seed: Annotated[int, typer.Option(help="Seed of all sampling, combined with each image's uid.")] = 0
    engine_options: o.EngineOptions
    marks: o.Marks = None
    drop: o.Drop = None
    retry: o.Retry = False
    trace: o.Trace = None
    run: o.RunOptions

    @property
    def choice(self) -> EngineChoice:
        return EngineChoice.of(self.model, self.engine, self.engine_options, self.run)


def check(options: AskOptions) -> AskConfig:
    """The stage's config. Does not access the model or the data. Raises BadInput."""
    from ...models.yes_no import YesNoConfig
    from ...stages.ask.asker import AskConfig

    sampled = {"samples": options.samples, "temperature": options.temperature}
    given = {name: value for name, value in sampled.items() if value is not None}
    if given and options.reader_mode != "sampled":
        name = next(iter(given))
        raise BadInput(f"--{name} {given[name]:g}: only means something with --reader-mode sampled")
    if options.presentations not in (None, 1, 2):
        raise BadInput(f"--presentations {options.presentations}: yes and no have 2 orders; give 1 or 2")
    reads = {"mode": options.reader_mode, "orders": options.presentations, "seed": options.seed, **given}
    reader = o.validated(YesNoConfig, **{name: value for name, value in reads.items() if value is not None})
    config = o.validated(AskConfig, questions=parse_questions(options.ask), reader=reader)
    options.choice.check()
    return config


@flattened
def ask(options: AskOptions) -> None:
    """Ask a vision-language model yes-or-no questions about every image; the probability of yes is a column each."""
    from ...stages.ask.asker import passed_on
    from ..jobs.artifacts import marks_beside
    from ..jobs.ask import AskStage
    from ..jobs.rows.engine import plan

    config, drop = check(options), o.dropped(options.drop)
    placement = options.choice.placement()
    setup = options.choice.setup(placement, config.room, options.trace)
    beside = marks_beside(options.marks)
    runs = options.run.plan_options(options.retry)
    job = plan(AskStage(config, setup), options.shards, options.out, beside=beside, **runs)
    code = run_withdrawing(job, placement, drop, config.schema, passed_on)
    if job.todo and code is not Exit.INTERRUPTED:
        _warn_of_unscored(options.out)
    raise typer.Exit(code)


def _warn_of_unscored(out: str) -> None:
    """Warn on stderr of questions without a probability in rows that are ok."""
    from ...manifests.artifact import Artifact
    from ..inspect.unscored import warnings

    try:
        lines = warnings(Artifact.open(out))
    except (OSError, ValueError, CapipeError) as error:  # everything is committed; `capipe verify` finds such errors
        lines = [f"answers without a probability were not counted: {error}"]
    for line in lines:
        print_err(f"warning: {line}")
