"""`capipe annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .outcome import run_plan


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
    from ..stages.annotate import AnnotateConfig
    from .annotating import AnnotateStage, chosen_prompts
    from .engine_stages import plan

    place = o.workplace(engine, gpus, runner, ray_address, ray_workers, tensor_parallel)
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
    )
    setup = o.engine_setup(model, engine, place, sees=True, options=options, room=config.room, trace=trace)
    made = plan(AnnotateStage(config, setup, model, pack), shards, out, fresh=fresh, retry=retry, share=share)
    raise typer.Exit(run_plan(made, place))
