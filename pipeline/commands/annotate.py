"""`capipe annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...terminal import print_err
from . import options as o
from .run_job import Exit, run_job


def annotate(
    shards: o.Shards,
    out: o.Out,
    model: Annotated[str, typer.Option(help="tiny/captioner, a folder, or a Hugging Face id.")],
    engine: o.EngineName = "auto",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="plain, short, dense, caprl, none (the image alone), name=text or name=@file; may be repeated."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Captions per prompt and image.")] = 1,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: o.TopP = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest caption in tokens.")] = 1024,
    seed: o.Seed = 0,
    max_attempts: Annotated[int, typer.Option(help="Rolls of an unhealthy caption, the first included.")] = 3,
    loop_repeats: Annotated[
        int, typer.Option(help="Copies in a row of a sentence that make a caption degenerate; short phrases need more.")
    ] = 4,
    longest_run: Annotated[
        int, typer.Option(help="Longest sound run of one character; rules and dot leaders may be 5 times as long.")
    ] = 40,
    distinct_words: Annotated[
        float, typer.Option(help="Smallest sound share of distinct words in a caption of 40 words or more.")
    ] = 0.15,
    keep_truncated: Annotated[bool, typer.Option("--keep-truncated", help="Take captions that were cut.")] = False,
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
    pack: Annotated[
        bool, typer.Option(help="Also write tars with the images (bytes as they came) and captions.")
    ] = False,
    retry: o.Retry = False,
    trace: Annotated[Path | None, typer.Option(help="Append a line per engine request to this file.")] = None,
    runner: o.Runner = "local",
    ray_address: o.RayAddress = None,
    ray_workers: o.RayWorkers = None,
    share: o.Share = False,
    fresh: o.Fresh = False,
) -> None:
    """Caption every image of the shards; one row out for every row in, whatever became of it."""
    from ...stages.annotate.captioner import AnnotateConfig
    from ...stages.annotate.quality_gate import QualityGateConfig
    from ..jobs.annotate import AnnotateStage, chosen_prompts
    from ..jobs.engine import plan

    place = o.placement(engine, gpus, runner, ray_address, ray_workers, tensor_parallel)
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
    health = o.validated(
        QualityGateConfig,
        loop_repeats=loop_repeats,
        longest_run=longest_run,
        distinct_words=distinct_words,
        keep_truncated=keep_truncated,
    )
    config = o.validated(
        AnnotateConfig,
        prompts=chosen_prompts(prompt, model, engine, system),
        samples=samples,
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        max_attempts=max_attempts,
        health=health,
    )
    setup = o.engine_setup(model, engine, place, sees=True, options=options, room=config.room, trace=trace)
    made = plan(AnnotateStage(config, setup, model, pack), shards, out, fresh=fresh, retry=retry, share=share)
    code = run_job(made, place)
    if made.todo and code is not Exit.INTERRUPTED:
        _warn_of_shared(out)
    raise typer.Exit(code)


def _warn_of_shared(out: str) -> None:
    """A line on stderr where many pictures have the same caption."""
    from ...manifests.artifact import Artifact
    from ..inspect.shared_captions import shared_captions

    artifact = Artifact.open(out)
    try:
        shared = shared_captions(artifact, list(artifact.committed()))
    except (OSError, ValueError) as error:  # all is committed by now; `capipe verify` looks for what is wrong
        print_err(f"warning: captions that pictures share were not counted: {error}")
        return
    if shared is not None:
        advice = "look whether the model sees them, and whether a cache answers in its place"
        print_err(f"warning: {shared}; {advice}")
