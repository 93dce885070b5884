"""What commands share: options that mean the same everywhere, and what they are turned into."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from ..errors import BadInput
from .engine_stages import EngineSetup
from .workplace import Workplace, ray_place

Config = TypeVar("Config", bound=BaseModel)

Shards = Annotated[str, typer.Option(help="Folder, glob, {00000..00099}.tar or fsspec URL of WebDataset tars.")]
Out = Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) of the artifact to write.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: remove what another configuration left in --out.")]
Retry = Annotated[bool, typer.Option(help="Do rows again that ended in engine_error.")]
EngineName = Annotated[str, typer.Option(help="auto, vllm, transformers, or URLs of servers.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling.")]
Seed = Annotated[int, typer.Option(help="Source of every draw, with each image's uid.")]
MaxPixels = Annotated[int | None, typer.Option(help="Largest image area the model sees; its own by default.")]
MinPixels = Annotated[int | None, typer.Option(help="Smallest image area the model sees.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float16.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Context length to make room for.")]
Concurrency = Annotated[int | None, typer.Option(help="Requests at once; by default what a server takes.")]
Gpus = Annotated[str | None, typer.Option(help="GPUs to use, e.g. 0,1; all by default; none for CPU.")]
GpuMemory = Annotated[float, typer.Option(help="Share of GPU memory for vLLM.")]
DecodeWorkers = Annotated[int | None, typer.Option(help="Image decoding processes per engine.")]
Runner = Annotated[Literal["local", "ray"], typer.Option(help="Processes of this machine, or actors of a Ray cluster.")]
RayAddress = Annotated[
    str | None, typer.Option(help="HOST:PORT of a Ray head, auto, or local; what is running, else local, by default.")
]
RayWorkers = Annotated[int | None, typer.Option(help="Ray actors; one per GPU by default, or per machine without any.")]
Share = Annotated[bool, typer.Option("--share", help="Let other processes with --share work on the same --out.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for a server's answer.")]


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


def workplace(
    engine: str, gpus: str | None, runner: str = "local", address: str | None = None, workers: int | None = None
) -> Workplace:
    """Where an engine's workers are to be; a server has GPUs of its own. Raises BadInput."""
    if runner == "local":
        if address is not None or workers is not None:
            option = "--ray-address" if address is not None else "--ray-workers"
            raise BadInput(f"{option}: only means something with --runner ray")
        return Workplace(() if "://" in engine else tuple(visible_gpus(gpus)))
    if gpus not in (None, "none"):
        raise BadInput(f"--gpus {gpus}: a Ray cluster hands out its GPUs itself; give --ray-workers N to use fewer")
    return Workplace(ray=ray_place(address, workers, gpu="://" not in engine and gpus is None))


def parse_bound(option: str, text: str, sign: str) -> tuple[float, bool]:
    """``>=0.75`` as (0.75, True), ``>0.75`` as (0.75, False); ``sign``: > or <. Raises BadInput."""
    match = re.fullmatch(rf"\s*{sign}(=?)\s*(\d+(?:\.\d+)?|\.\d+)\s*", text)
    if match is None or not 0 <= float(match[2]) <= 1:
        raise BadInput(f"{option} {text!r}: write {sign} or {sign}= and a share from 0 to 1, e.g. '{sign}=0.5'")
    return float(match[2]), bool(match[1])


def engine_setup(
    model: str, engine: str, place: Workplace, *, sees: bool, trace: Path | None = None, **options: Any
) -> EngineSetup:
    """An engine's description from options; ``sees``: images go to it. None stands for an option's own default."""
    from ..models.loading import EngineConfig

    decode_workers = options.pop("decode_workers", None) or default_decode_workers(len(place.gpus))
    config = EngineConfig(kind=engine, model=model, **options)
    return EngineSetup(config, decode_workers=decode_workers if sees else 0, trace=trace)
