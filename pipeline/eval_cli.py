"""`capipe eval`: captions, graded by a reader, in figures; and `capipe compare`, two such runs against each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import BadInput
from ..terminal import print_err, print_line
from . import options as o
from .key_values import second_model
from .outcome import Exit, run_plan
from .quiz_cli import refuse_own

if TYPE_CHECKING:
    from ..trainer.figures import Caution, Comparison, Report

CAPTIONED, GRADED = "captions", "graded"  # the artifacts in --out; the report lies beside them


def evaluate(
    shards: o.Shards,
    questions: Annotated[str, typer.Option(help="Folder of `capipe qa`, or an artifact of questions.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for captions, grades and the report.")],
    reader: Annotated[str, typer.Option(help="Who answers from captions: tiny/holdout-reader, a folder or an id.")],
    model: Annotated[str | None, typer.Option(help="Captioner to evaluate; or give --captions.")] = None,
    captions: Annotated[str | None, typer.Option(help="Artifact of captions made before.")] = None,
    engine: o.EngineName = "auto",
    reader_engine: Annotated[str | None, typer.Option(help="The reader's; the captioner's kind by default.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="As for annotate; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Captions per prompt and image (k).")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the captioner; 0 is greedy.")] = 1.0,
    top_p: o.TopP = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest caption in tokens.")] = 1024,
    seed: o.Seed = 0,
    presentations: Annotated[int | None, typer.Option(help="Orders of options per question; all by default.")] = None,
    reader_mode: o.ReaderMode = None,
    reader_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For the reader, in place of the captioner's: gpu-memory=0.4, dtype=…, template.KEY=…, or vLLM's; "
            "may be repeated.",
        ),
    ] = None,
    generic: Annotated[str | None, typer.Option(help="A caption that fits any image, to be graded as a floor.")] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP for recall at 1, 5 and 10; one that was neither reward nor filter: tiny/eval-clip."),
    ] = None,
    cosine: Annotated[
        str | None, typer.Option(help="CLIP or BLIP for the mean cosine of captions and images; may be the reward's.")
    ] = None,
    language_model: Annotated[str | None, typer.Option(help="Model for the captions' perplexity: tiny/opt.")] = None,
    controls: Annotated[
        bool, typer.Option(help="Grade blind, empty, generic, self-oracle and oracle captions, too.")
    ] = True,
    max_pixels: o.MaxPixels = None,
    min_pixels: o.MinPixels = None,
    dtype: o.Dtype = "auto",
    max_model_len: o.MaxModelLen = None,
    concurrency: o.Concurrency = None,
    gpus: o.Gpus = None,
    gpu_memory: o.GpuMemory = 0.9,
    tensor_parallel: o.TensorParallel = 1,
    adapter: o.Adapter = None,
    template_arg: o.TemplateArg = None,
    engine_arg: o.EngineArg = None,
    decode_workers: o.DecodeWorkers = None,
    timeout: o.Timeout = 300.0,
    retry: o.Retry = False,
    runner: o.Runner = "local",
    ray_address: o.RayAddress = None,
    ray_workers: o.RayWorkers = None,
    share: o.Share = False,
    fresh: o.Fresh = False,
) -> None:
    """Measure a captioner by how well a reader answers quiz questions from its captions alone."""
    from ..manifests.artifact import Artifact
    from ..models.clip_source import clip_place
    from ..models.context import quiz_room
    from ..models.lm_scores import load_text_scorer
    from ..models.reader import ReaderConfig
    from ..stages import grade, screen
    from ..stages.annotate import AnnotateConfig
    from .annotating import AnnotateStage, chosen_prompts
    from .engine_stages import plan
    from .grading import GradeStage
    from .reader_checks import asked_of, caption_texts, check_captions, check_limit, rewarded_by, told_texts
    from .reporting import Judges, load_cosine, report_on, write_report

    if (model is None) == (captions is None):
        raise BadInput("give either --model, a captioner to evaluate, or --captions, what one has written")
    asked = question_artifact(questions)
    if clip is not None:
        clip_place(clip)  # raises where there is none such, before anything is captioned
    if cosine is not None:
        load_cosine(cosine)
    if language_model is not None:
        load_text_scorer(language_model)
    config = o.validated(
        grade.GradeConfig,
        presentations=presentations,
        controls=controls,
        **({} if generic is None else {"generic": generic}),
    )
    options = o.engine_options(
        adapter=adapter,
        engine_arg=engine_arg,
        template_arg=template_arg,
        tensor_parallel=tensor_parallel,
        gpu_memory=gpu_memory,
        timeout=timeout,
        decode_workers=decode_workers,
        dtype=dtype,
        max_model_len=max_model_len,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        concurrency=concurrency,
    )
    if model is None:
        refuse_own(options, "--captions has no captioner: give it to the reader, by --reader-arg")
    prompts = chosen_prompts(prompt, model, engine)
    refuse_controls([each.name for each in prompts])
    own = second_model("--reader-arg", options, reader_arg, same=False, sees=False)
    kind = reader_engine or engine
    reader_place = o.workplace(kind, gpus, runner, ray_address, ray_workers, own["tensor_parallel_size"])
    mode = reader_mode or "choose"
    written = None if captions is None else captions_artifact(captions)
    longest = max_tokens if written is None else written.setting("semantic", "annotate", "max_tokens", kind=int)
    reads = ReaderConfig(presentations=config.presentations, mode=mode)
    setup = o.engine_setup(
        reader,
        kind,
        reader_place,
        sees=False,
        options=own,
        room=quiz_room(longest, reads.answer_tokens),
        option="--reader-arg",
    )
    reading = GradeStage(config, setup, mode, asked_of(asked))
    runs: dict[str, Any] = {"fresh": fresh, "retry": retry, "share": share}
    codes = [Exit.OK]
    if model is not None:
        check_limit(reading, max_tokens)
        place = o.workplace(engine, gpus, runner, ray_address, ray_workers, tensor_parallel)
        asks = o.validated(
            AnnotateConfig,
            prompts=prompts,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            max_attempts=1,  # what the captioner writes is what is measured
        )
        setup = o.engine_setup(model, engine, place, sees=True, options=options, room=asks.room)
        captions = str(out / CAPTIONED)
        codes.append(run_plan(plan(AnnotateStage(asks, setup, model), shards, captions, **runs), place))
        if codes[-1] is Exit.INTERRUPTED:
            raise typer.Exit(codes[-1])
        written = captions_artifact(captions)
    assert written is not None
    beside = {screen.QUESTIONS: asked, grade.CAPTIONS: written}
    lengths = check_captions(reading, chain(caption_texts(written), told_texts(asked) if controls else ()))
    warnings = [*lengths.cautions, *rewarded_by(written, reading)]
    say_warnings(warnings)
    graded = str(out / GRADED)
    reading = reading.with_room(lengths.longest)
    codes.append(run_plan(plan(reading, shards, graded, beside=beside, **runs), reader_place))
    if codes[-1] is Exit.INTERRUPTED:
        raise typer.Exit(codes[-1])
    done = Artifact.open(graded)
    if not done.committed():  # what kept every shard from being graded has been said
        raise typer.Exit(max(codes))
    report = report_on(done, Judges(clip, cosine, language_model), warnings)
    write_report(report, out)
    show(report)
    say_warnings(report.warnings)
    print_line(f"report: {out / 'report.md'}")
    raise typer.Exit(max(codes))


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a `capipe eval`.")],
    second: Annotated[Path, typer.Argument(help="Folder of another one, on the same questions with the same reader.")],
    first_system: Annotated[
        str | None, typer.Option(help="Prompt (or control) of the first; its first prompt.")
    ] = None,
    second_system: Annotated[str | None, typer.Option(help="The same of the second.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for comparison.md and comparison.json.")] = None,
) -> None:
    """Hold two evaluations against each other: the difference in quiz accuracy, by a paired bootstrap over images."""
    from ..trainer.comparison import compare as compared
    from .reporting import run_of, write_report

    comparison = compared(run_of(first / GRADED, first_system), run_of(second / GRADED, second_system))
    show(comparison)
    if out is not None:
        write_report(comparison, out, "comparison")
        print_line(f"comparison: {out / 'comparison.md'}")


def show(value: Report | Comparison) -> None:
    """The tables on stdout."""
    from ..trainer.report import terminal

    console = Console(soft_wrap=False)
    for table in terminal(value):
        console.print(table)


def say_warnings(warnings: Sequence[Caution]) -> None:
    """A line each on stderr."""
    for warning in warnings:
        print_err(f"warning: {warning.text}")


def refuse_controls(names: list[str]) -> None:
    """Raise BadInput for captions that could not be told from the controls beside them."""
    from ..stages.grade import CONTROLS

    taken = next((name for name in names if name in CONTROLS), None)
    if taken is not None:
        raise BadInput(f"captions named {taken!r}: that is a control's name; write --prompt another-name=text")


def question_artifact(url: str) -> Any:
    """The questions to ask: those that were screened, where the folder is one of `capipe qa`. Raises BadInput."""
    from ..manifests.artifact import Artifact
    from .quiz_cli import SCREENED, WRITTEN

    found = next((each for each in (url, f"{url}/{SCREENED}", f"{url}/{WRITTEN}") if Artifact.exists(each)), None)
    artifact = Artifact.open(found) if found is not None else None
    if artifact is None or artifact.stage not in ("questions", "screen"):
        raise BadInput(f"{url}: no questions of `capipe qa` there; name its --out folder")
    return artifact


def captions_artifact(url: str) -> Any:
    """Captions made before. Raises BadInput where the artifact is of another stage."""
    from ..manifests.artifact import Artifact

    artifact = Artifact.open(url)
    if artifact.stage != "annotate":
        raise BadInput(f"{url}: an artifact of stage {artifact.stage!r}; --captions takes one of `capipe annotate`")
    refuse_controls([name for name, _ in artifact.prompts()])
    return artifact
