"""`capipe qa`: questions written or imported, then screened."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...errors import BadInput
from ...terminal import print_err
from ..jobs.artifacts import SCREENED, WRITTEN
from ..jobs.engine import EngineSetup, StagePlan
from ..runners.placement import Placement
from . import options as o
from .key_values import second_model
from .run_job import Exit, run_job


def qa(
    shards: o.Shards,
    out: Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) for two artifacts: written and screened.")],
    model: Annotated[str | None, typer.Option(help="Who writes: tiny/teacher, a folder, or a Hugging Face id.")] = None,
    import_: Annotated[
        str | None, typer.Option("--import", help="Take questions from this set (JSON, JSONL, Parquet, CSV) instead.")
    ] = None,
    distractors: Annotated[
        int, typer.Option(help="--import: wrong options for open-ended questions, from the set's other answers.")
    ] = 0,
    engine: o.EngineName = "auto",
    screen_model: Annotated[str | None, typer.Option(help="Who screens; who writes by default.")] = None,
    screen_engine: Annotated[str | None, typer.Option(help="Its engine; the writer's kind by default.")] = None,
    per_image: Annotated[int, typer.Option(help="Questions asked for per image.")] = 5,
    fewest: Annotated[int, typer.Option(help="Ask again while an image has fewer usable ones.")] = 1,
    max_attempts: Annotated[int, typer.Option(help="Requests per image, the first included.")] = 3,
    temperature: Annotated[float, typer.Option(help="Of the writer; 0 is greedy.")] = 0.7,
    top_p: o.TopP = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer of the writer in tokens.")] = 2048,
    seed: o.Seed = 0,
    guided: Annotated[
        bool | None, typer.Option(help="Hold the writer to the JSON schema; by default where the engine can.")
    ] = None,
    screen: Annotated[
        str, typer.Option(help="strict (right in all orders with the image, in none without), caprl, or none.")
    ] = "strict",
    with_image: Annotated[
        str | None, typer.Option(help="Bound on accuracy with the image, e.g. '>=1' or '>0.75'.")
    ] = None,
    without_image: Annotated[
        str | None, typer.Option(help="Bound on accuracy without it, e.g. '<=0' or '<0.25'.")
    ] = None,
    presentations: Annotated[int | None, typer.Option(help="Orders of options per question; all by default.")] = None,
    reader_mode: o.ReaderMode = None,
    screen_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For who screens, in place of the writer's: gpu-memory=0.4, max-pixels=…, template.KEY=…, or vLLM's; "
            "may be repeated.",
        ),
    ] = None,
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
    """Write quiz questions about every image, or import them, and keep those that need the image and no more."""
    from ...manifests.artifact import Artifact
    from ...stages.questions.screen import QUESTIONS
    from ...stages.questions.write import QuestionsConfig
    from ..jobs.engine import plan
    from ..jobs.qa import QuestionsStage, ScreenStage, engine_guides

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
    config = screen_config(screen, with_image, without_image, presentations, reader_mode)  # before anything is written
    screener = screen_model or model
    if (model is None) == (import_ is None):
        raise BadInput("give either --model, who is to write the questions, or --import, a set to take them from")
    if config is not None and screener is None:
        raise BadInput(
            "--screen-model: imported questions are screened by a model that sees; name one, or --screen none"
        )
    if config is None and screen_arg:
        raise BadInput("--screen-arg: --screen none has nobody screen; leave one of them out")
    if model is None:
        refuse_own(options, "--import has no writer: give it to who screens, by --screen-arg")
    screening: EngineSetup | None = None
    if config is not None:
        assert screener is not None
        own = second_model("--screen-arg", options, screen_arg, same=screen_model is None)
        kind = screen_engine or engine
        screen_place = o.placement(kind, gpus, runner, ray_address, ray_workers, own["tensor_parallel_size"])
        screening = o.engine_setup(
            screener, kind, screen_place, sees=True, options=own, room=config.room, option="--screen-arg"
        )
    runs: dict[str, Any] = {"fresh": fresh, "retry": retry, "share": share}
    written = f"{out.rstrip('/')}/{WRITTEN}"
    if import_ is not None:
        code = import_questions(import_, distractors, seed, shards, written, runs)
    else:
        assert model is not None
        asked = o.validated(
            QuestionsConfig,
            per_image=per_image,
            fewest=fewest,
            max_attempts=max_attempts,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
        )
        place = o.placement(engine, gpus, runner, ray_address, ray_workers, tensor_parallel)
        setup = o.engine_setup(model, engine, place, sees=True, options=options, room=asked.room)
        held = engine_guides(setup.engine) if guided is None else guided
        code = run_job(plan(QuestionsStage(asked, setup, model, held), shards, written, **runs), place)
    if config is None or code not in (Exit.OK, Exit.UNRESOLVED):
        raise typer.Exit(code)
    assert screener is not None and screening is not None
    beside = {QUESTIONS: Artifact.open(written)}
    screened = f"{out.rstrip('/')}/{SCREENED}"
    made = plan(ScreenStage(config, screening, screener), shards, screened, beside=beside, **runs)
    raise typer.Exit(max(code, run_job(made, screen_place)))


def refuse_own(options: dict[str, Any], why: str) -> None:
    """Raise BadInput for options of a first model where there is none."""
    for option, name in (
        ("--engine-arg", "engine_args"),
        ("--template-arg", "template_args"),
        ("--adapter", "adapter"),
    ):
        if options[name]:
            raise BadInput(f"{option}: {why}")


def import_questions(path: str, distractors: int, seed: int, shards: str, out: str, runs: dict[str, Any]) -> Exit:
    """Import a set into an artifact; records that no image of the shards gets are listed beside it."""
    from ...manifests.files.storage import PRIVATE
    from ...manifests.shards import expand
    from ...models.quiz import MOST_OPTIONS
    from ..jobs.engine import plan
    from ..jobs.qa import ImportStage, unmatched_lines

    if not 0 <= distractors < MOST_OPTIONS:
        most = MOST_OPTIONS - 1
        raise BadInput(
            f"--distractors {distractors}: 0 to leave open-ended questions alone, or up to {most} wrong options"
        )
    stage = ImportStage(path, tuple(expand(shards)), distractors, seed)
    refused = stage.refused()  # reads the whole set: what is wrong with it is found before anything is written
    strangers = stage.unmatched()
    made: StagePlan = plan(stage, shards, out, also_read=[path], **runs)
    made.artifact.folder.write(f"{PRIVATE}/unmatched.jsonl", unmatched_lines(strangers))
    if strangers:
        first = strangers[0]
        text = f"capipe: {first.where}: {first.reason} ({first.image!r}); {len(strangers)} such records are listed in "
        print_err(f"{text}{out}/{PRIVATE}/unmatched.jsonl, give --shards that hold their images")
    if refused is not None:
        print_err(f"capipe: {refused}")
    return run_job(made, Placement())


def screen_config(
    name: str,
    with_image: str | None,
    without_image: str | None,
    presentations: int | None,
    mode: str | None = None,
) -> Any:
    """The screen that the options describe; None for none. Raises BadInput."""
    from ...stages.questions.screen import PRESETS

    if name == "none":
        if mode is not None:
            raise BadInput("--reader-mode: --screen none has nobody screen; leave one of them out")
        return None
    if name not in PRESETS:
        raise BadInput(f"--screen {name!r}: there are {', '.join(PRESETS)} and none")
    config = PRESETS[name]
    if with_image is not None:
        bound, inclusive = o.parse_bound("--with-image", with_image, ">")
        config = config.model_copy(update={"image_min": bound, "image_inclusive": inclusive})
    if without_image is not None:
        bound, inclusive = o.parse_bound("--without-image", without_image, "<")
        config = config.model_copy(update={"text_max": bound, "text_inclusive": inclusive})
    if presentations is not None:
        if presentations < 1:
            raise BadInput(f"--presentations {presentations}: at least 1")
        config = config.model_copy(update={"reader": config.reader.model_copy(update={"presentations": presentations})})
    if mode is not None:
        config = config.model_copy(update={"reader": config.reader.model_copy(update={"mode": mode})})
    return config
