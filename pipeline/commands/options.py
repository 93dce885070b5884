"""What commands share: options that mean the same everywhere, and what they are turned into."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from ...errors import BadInput
from ...terminal import print_err
from ..jobs.engine import EngineSetup
from ..runners.placement import Placement
from ..runners.ray import ray_place
from .key_values import engine_args, key_values

Config = TypeVar("Config", bound=BaseModel)

Shards = Annotated[str, typer.Option(help="Folder, glob, {00000..00099}.tar or fsspec URL of WebDataset tars.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL_OR_FOLDER",
        help="Where else tars may be read that a manifest names; local ones and the store given are; may be repeated.",
    ),
]
Out = Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) of the artifact to write.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: remove what another configuration left in --out.")]
Retry = Annotated[bool, typer.Option(help="Do rows again that ended in engine_error.")]
EngineName = Annotated[str, typer.Option(help="auto, vllm, transformers, or URLs of servers.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling.")]
Seed = Annotated[int, typer.Option(help="Source of every draw, with each image's uid.")]
MaxPixels = Annotated[int | None, typer.Option(help="Largest image area the model sees; its own by default.")]
MinPixels = Annotated[int | None, typer.Option(help="Smallest image area the model sees.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float16.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Context in tokens; by default what prompt, largest image and answer take.")
]
Concurrency = Annotated[int | None, typer.Option(help="Requests at once; by default what a server takes.")]
Gpus = Annotated[str | None, typer.Option(help="GPUs to use, e.g. 0,1; all by default; none for CPU.")]
GpuMemory = Annotated[float, typer.Option(help="Share of GPU memory for vLLM.")]
TensorParallel = Annotated[int, typer.Option(min=1, help="GPUs that share one model, by vLLM.")]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="For the chat template: enable_thinking=false; may be repeated."),
]
EngineArg = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="For vLLM, by its own names: quantization=fp8; may be repeated."),
]
Adapter = Annotated[str | None, typer.Option(metavar="FOLDER", help="LoRA adapter to merge into the model.")]
ReaderMode = Annotated[
    Literal["choose", "sampled"] | None,
    typer.Option(help="Answers as the likeliest letter, or read from drawn text (servers without log-probabilities)."),
]
DecodeWorkers = Annotated[int | None, typer.Option(help="Image decoding processes per engine.")]
Runner = Annotated[Literal["local", "ray"], typer.Option(help="Processes of this machine, or actors of a Ray cluster.")]
RayAddress = Annotated[
    str | None, typer.Option(help="HOST:PORT of a Ray head, auto, or local; what is running, else local, by default.")
]
RayWorkers = Annotated[int | None, typer.Option(help="Ray actors; one per GPU by default, or per machine without any.")]
Share = Annotated[bool, typer.Option("--share", help="Let other processes with --share work on the same --out.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for a server's whole answer.")]
AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="HOST", help="Host in the recipe that may get the API key; may be repeated."),
]


def validated(kind: type[Config], **values: Any) -> Config:
    """A stage's config from options; what pydantic refuses becomes one line that names the option."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"{option}: {first['msg']} (got {first['input']!r})") from None


def visible_gpus(option: str | None) -> list[str]:
    """GPUs to use by their CUDA numbers: ``--gpus``, else all that are visible; an empty list where there are none."""
    if option is not None:
        names = [name.strip() for name in option.split(",") if name.strip()]
        return [""] if names in ([], ["none"]) else names  # one worker that sees no GPU
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    import torch  # asks the driver without starting CUDA in this process

    return [str(i) for i in range(torch.cuda.device_count())]


def default_decode_workers(gpus: int) -> int:
    """Decoding processes per engine: the cores shared out, one kept for the engine, never more than 16."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(16, cores // max(1, gpus) - 1))


def placement(
    engine: str,
    gpus: str | None,
    runner: str = "local",
    address: str | None = None,
    workers: int | None = None,
    tensor_parallel: int = 1,
) -> Placement:
    """Where an engine's workers are to be, each with ``tensor_parallel`` GPUs; a server has its own.

    Raises BadInput.
    """
    from ...models.engines.loading import check_kind

    if engine:  # scorers have none
        check_kind(engine)
    served = "://" in engine
    if runner == "local":
        if address is not None or workers is not None:
            option = "--ray-address" if address is not None else "--ray-workers"
            raise BadInput(f"{option}: only means something with --runner ray")
        return Placement(() if served else gpu_groups(visible_gpus(gpus), tensor_parallel))
    if gpus not in (None, "none"):
        raise BadInput(f"--gpus {gpus}: a Ray cluster hands out its GPUs itself; give --ray-workers N to use fewer")
    gpu = not served and gpus is None
    if tensor_parallel > 1 and not served and not gpu:
        raise BadInput(f"--tensor-parallel {tensor_parallel}: with --gpus none there is no GPU; leave one of them out")
    return Placement(ray=ray_place(address, workers, gpu, 1 if served else tensor_parallel))


def gpu_groups(names: Sequence[str], size: int) -> tuple[str, ...]:
    """GPUs in groups for one engine each, as CUDA_VISIBLE_DEVICES has them; says which are left over.

    Raises BadInput where there are not enough for one group.
    """
    if size == 1:
        return tuple(names)
    names = [name for name in names if name]
    if len(names) < size:
        there = f"only GPU {', '.join(names)}" if names else "no GPU; vLLM's CPU backend is run by one process here"
        raise BadInput(f"--tensor-parallel {size}: there is {there}")
    whole = len(names) - len(names) % size
    if names[whole:]:
        _say_once(f"capipe: --tensor-parallel {size}: GPU {', '.join(names[whole:])} left over")
    return tuple(",".join(names[at : at + size]) for at in range(0, whole, size))


@cache
def _say_once(line: str) -> None:
    """A command may ask for the places of two models."""
    print_err(line)


def parse_bound(option: str, text: str, sign: str) -> tuple[float, bool]:
    """``>=0.75`` as (0.75, True), ``>0.75`` as (0.75, False); ``sign``: > or <. Raises BadInput."""
    match = re.fullmatch(rf"\s*{sign}(=?)\s*(\d+(?:\.\d+)?|\.\d+)\s*", text)
    if match is None or not 0 <= float(match[2]) <= 1:
        raise BadInput(f"{option} {text!r}: write {sign} or {sign}= and a share from 0 to 1, e.g. '{sign}=0.5'")
    return float(match[2]), bool(match[1])


def engine_options(
    *,
    adapter: str | None = None,
    engine_arg: Sequence[str] | None = None,
    template_arg: Sequence[str] | None = None,
    tensor_parallel: int = 1,
    gpu_memory: float = 0.9,
    timeout: float = 300.0,
    **others: Any,
) -> dict[str, Any]:
    """A model's options as :func:`engine_setup` takes them. Raises BadInput for what is no key=value."""
    return {
        "gpu_memory_utilization": gpu_memory,
        "timeout_s": timeout,
        "tensor_parallel_size": tensor_parallel,
        "adapter": adapter or "",
        "engine_args": engine_args("--engine-arg", engine_arg),
        "template_args": key_values("--template-arg", template_arg),
        **others,
    }


def engine_setup(
    model: str,
    engine: str,
    place: Placement,
    *,
    sees: bool,
    options: Mapping[str, Any],
    room: int | None = None,
    trace: Path | None = None,
    option: str | None = None,
) -> EngineSetup:
    """An engine's description from options, None among which stands for an option's own default.

    ``sees``: images go to it; ``room``: tokens beside an image; ``option``: what a second model's values came from.
    Raises BadInput, also for arguments that vLLM does not know.
    """
    from ...models.engines.loading import EngineConfig, vllm_runs
    from ...models.engines.vllm.arguments import check_engine_args

    given = {key: value for key, value in options.items() if sees or key not in ("min_pixels", "max_pixels")}
    decode_workers = given.pop("decode_workers", None) or default_decode_workers(len(place.gpus))
    try:
        config = EngineConfig(kind=engine, model=model, room=room, **given)
        check_engine_args(config.engine_args)
    except BadInput as error:
        raise BadInput(f"{option}: {error}") if option else error from None
    if config.engine_args and config.kind == "auto" and place.ray is None and not vllm_runs():
        raise BadInput(f"{option or '--engine-arg'}: is for vLLM, which does not run here; `capipe doctor` says why")
    return EngineSetup(config, decode_workers=decode_workers if sees else 0, trace=trace)
