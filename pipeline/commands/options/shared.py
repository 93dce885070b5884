"""Options with the same meaning in every command, single or in groups (:mod:`.groups`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from ....errors import BadInput
from ....manifests.files.outside import is_url
from ...runners.placement import Placement
from ...runners.ray.cluster import RayCluster, ray_cluster
from ..gpus import default_decode_workers, gpu_groups, visible_gpus
from .key_values import FIELDS, engine_args, key_values

if TYPE_CHECKING:
    from ....manifests.withdrawal.uid_set import UidSet

Config = TypeVar("Config", bound=BaseModel)

Shards = Annotated[str, typer.Option(help="Folder, glob, {00000..00099}.tar or fsspec URL of WebDataset tars.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL_OR_FOLDER",
        help="Where else tars may be read that a manifest names; local ones and the store given are; may be repeated.",
    ),
]


def local_path(given: str) -> Path:
    """Parser of options that name what is written locally. Raises BadInput for a URL: as a path it would be a folder
    named ``s3:``."""
    if is_url(str(given)):
        raise BadInput(f"{given}: models, logs and single files are written to local disks alone; give a local path")
    return Path(given)


Trace = Annotated[Path | None, typer.Option(help="Append a line per engine request to this file.", parser=local_path)]
Out = Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) of the artifact to write.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: remove what another configuration left in --out.")]
Drop = Annotated[
    str | None,
    typer.Option(
        "--drop",
        metavar="FILE",
        help="Uids of withdrawn images, one per line, or FILE.parquet[:COLUMN]: their rows become withdrawn.",
    ),
]
Marks = Annotated[
    str | None,
    typer.Option(
        "--marks",
        help="Marks of `capipe dedup`, or a selection of `capipe filter`: rows not ok there are left out, with that "
        "status.",
    ),
]
Retry = Annotated[bool, typer.Option(help="Do rows again that ended in engine_error.")]
ReaderMode = Annotated[
    Literal["choose", "sampled"] | None,
    typer.Option(
        help="Answers as the likeliest letter, or read from sampled text (servers without log-probabilities)."
    ),
]
EngineName = Annotated[
    str, typer.Option(help="auto, vllm, transformers, URLs of servers, or the import path of your own.")
]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float16.")]
Gpus = Annotated[str | None, typer.Option(help="GPUs to use, e.g. 0,1; all by default; none for CPU.")]
DecodeWorkers = Annotated[
    int | None, typer.Option(min=1, help="Image decoding processes per engine; a machine's cores ÷ engines by default.")
]
Workers = Annotated[int | None, typer.Option(help="Processes; one per core by default.")]
AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="HOST", help="Host in the recipe that may get the API key; may be repeated."),
]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What a captioner is asked."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="plain, short, dense, caprl, none (the image alone), name=text or name=@file; may be repeated. In a "
            "text {text}, {meta.KEY} and {captions.NAME} stand for the row's text, metadata and an earlier caption."
        ),
    ] = None
    fallback_prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="Asked instead of prompt NAME where a row lacks one of its fields; plain by default; may be repeated.",
        ),
    ] = None
    field_bytes: Annotated[
        int, typer.Option(help="Longest {text} or {meta.KEY} in a prompt, in bytes of UTF-8; longer ones are cut.")
    ] = 1024


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options of a model."""

    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0
    max_tokens: Annotated[int, typer.Option(help="Longest caption in tokens.")] = 1024
    seed: Annotated[int, typer.Option(help="Seed of all sampling, combined with each image's uid.")] = 0


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Rules for captions, beside their sampling, named as in AnnotateConfig."""

    beams: Annotated[int, typer.Option(help="Width of a beam search, by transformers; 1 is none.")] = 1
    no_repeat_ngram: Annotated[
        int, typer.Option(help="No n-gram of so many tokens occurs twice, by transformers; 0 is no rule.")
    ] = 0
    min_tokens: Annotated[int, typer.Option(help="Shortest caption in tokens.")] = 0


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """Options for answering quiz questions with a model."""

    presentations: Annotated[int | None, typer.Option(help="Orders of options per question; all by default.")] = None
    reader_mode: ReaderMode = None
    reader_prompt: Annotated[
        Literal["own", "caprl"],
        typer.Option(help="caprl: about captions with two worked examples; the option to abstain is always last."),
    ] = "own"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Engine options of a command's first model. Some apply only to vLLM; a server has its own settings."""

    max_pixels: Annotated[int | None, typer.Option(help="Largest image area the model sees; its own by default.")] = (
        None
    )
    min_pixels: Annotated[int | None, typer.Option(help="Smallest image area the model sees.")] = None
    dtype: Dtype = "auto"
    max_model_len: Annotated[
        int | None, typer.Option(help="Context in tokens; by default what prompt, largest image and answer take.")
    ] = None
    concurrency: Annotated[int | None, typer.Option(help="Requests at once; by default what a server takes.")] = None
    gpus: Gpus = None
    gpu_memory: Annotated[float, typer.Option(help="Share of GPU memory for vLLM.")] = 0.9
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share one model, by vLLM.")] = 1
    adapter: Annotated[str | None, typer.Option(metavar="FOLDER", help="LoRA adapter to merge into the model.")] = None
    template_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For the chat template: enable_thinking=false; may be repeated."),
    ] = None
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For vLLM, by its own names: quantization=fp8; may be repeated."),
    ] = None
    decode_workers: DecodeWorkers = None
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a server's whole answer.")] = 300.0

    def engine_settings(self) -> dict[str, Any]:
        """Settings for the model's engine, named as in EngineConfig, and ``decode_workers``.

        Raises BadInput for a malformed key=value.
        """
        named = {field: getattr(self, key.replace("-", "_")) for key, (field, _) in FIELDS.items()}
        return {
            **named,
            "adapter": self.adapter or "",
            "engine_args": engine_args("--engine-arg", self.engine_arg),
            "template_args": key_values("--template-arg", self.template_arg),
        }


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """Options for the machines of a job, and for other commands on the same output."""

    runner: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes of this machine, or actors of a Ray cluster.")
    ] = "local"
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray head, auto, or local; what is running, else local, by default."),
    ] = None
    ray_workers: Annotated[
        int | None,
        typer.Option(help="Ray actors; by default one per GPU, or machine without any, and per core without a model."),
    ] = None
    share: Annotated[bool, typer.Option("--share", help="Let other processes with --share work on the same --out.")] = (
        False
    )

    def check_runner(self, workers: int | None = None) -> None:
        """Raises BadInput for options of the other runner; ``workers``: of --workers, where a command has it."""
        if self.runner == "local":
            if self.ray_address is not None or self.ray_workers is not None:
                option = "--ray-address" if self.ray_address is not None else "--ray-workers"
                raise BadInput(f"{option}: only means something with --runner ray")
        elif workers is not None:
            raise BadInput(f"--workers {workers}: processes of this machine; with --runner ray, give --ray-workers")

    def refuse_taking_back(self, **words: bool) -> None:
        """Raises BadInput for an option that takes shards back which others may be adding to."""
        given = next((word for word, is_given in words.items() if is_given), None)
        if self.share and given is not None:
            text = f"--{given}: takes committed shards back, which others may be adding to; run it without --share"
            raise BadInput(text)

    def cluster_of_tasks(self) -> RayCluster | None:
        """The cluster for tasks without a model: one actor per core. Raises BadInput."""
        if self.runner == "local":
            return None
        return ray_cluster(self.ray_address, self.ray_workers, gpu=False, cores=True)


@dataclass(frozen=True, kw_only=True)
class TaskOptions(RunnerOptions):
    """Options for the machines of a job without a model, and for restarting."""

    workers: Workers = None
    fresh: Fresh = False

    def check(self) -> None:
        """Raises BadInput for options that contradict each other."""
        self.check_runner(self.workers)
        self.refuse_taking_back(fresh=self.fresh)


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunnerOptions):
    """Options for the placement of a job, its workers, and restarting."""

    fresh: Fresh = False

    def check(self, engine: str, gpus: str | None, tensor_parallel: int = 1) -> None:
        """Raises BadInput for conflicting placements; ``engine``: empty for scorers, which have none."""
        from ....models.engines.loading import check_kind

        if engine:
            check_kind(engine)
        self.check_runner()
        if self.runner == "local":
            return
        if gpus not in (None, "none"):
            raise BadInput(f"--gpus {gpus}: a Ray cluster hands out its GPUs itself; give --ray-workers N to use fewer")
        if tensor_parallel > 1 and "://" not in engine and gpus == "none":
            raise BadInput(
                f"--tensor-parallel {tensor_parallel}: with --gpus none there is no GPU; leave one of them out"
            )

    def plan_options(self, retry: bool) -> dict[str, Any]:
        """The options used for planning a job."""
        return {"fresh": self.fresh, "retry": retry, "share": self.share}

    def placement(self, engine: str, gpus: str | None, tensor_parallel: int = 1) -> Placement:
        """Placement of an engine's workers, each with ``tensor_parallel`` GPUs; a server has its own.

        Raises BadInput.
        """
        self.check(engine, gpus, tensor_parallel)
        served = "://" in engine
        if self.runner == "local":
            return Placement(() if served else gpu_groups(visible_gpus(gpus), tensor_parallel))
        gpu = not served and gpus is None
        return Placement(ray=ray_cluster(self.ray_address, self.ray_workers, gpu, 1 if served else tensor_parallel))


@dataclass(frozen=True, kw_only=True)
class ScorerOptions:
    """Options for running scorers (CLIP, image-text matching)."""

    dtype: Dtype = "auto"
    gpus: Gpus = None
    decode_workers: DecodeWorkers = None

    def check(self, run: RunOptions) -> None:
        """Raises BadInput."""
        from ....models.engines.loading import check_dtype

        run.check("", self.gpus)
        check_dtype(self.dtype)

    def decoders(self, place: Placement) -> int:
        """Number of decoding processes per worker."""
        return self.decode_workers or default_decode_workers(place)


def dropped(given: str | None) -> UidSet | None:
    """The list of ``--drop``. Raises BadInput."""
    from ....manifests.withdrawal.uid_set import read_uids

    return None if given is None else read_uids(given)


def validated(kind: type[Config], **values: Any) -> Config:
    """A stage's config from options; pydantic errors become one line that names the option."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # options that do not go together
            raise BadInput(first["msg"].removeprefix("Value error, ")) from None
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"{option}: {first['msg']} (got {first['input']!r})") from None


def parse_bound(option: str, text: str, sign: str) -> tuple[float, bool]:
    """Parse ``>=0.75`` into (0.75, True), ``>0.75`` into (0.75, False); ``sign``: > or <. Raises BadInput."""
    match = re.fullmatch(rf"\s*{sign}(=?)\s*(\d+(?:\.\d+)?|\.\d+)\s*", text)
    if match is None or not 0 <= float(match[2]) <= 1:
        raise BadInput(f"{option} {text!r}: write {sign} or {sign}= and a share from 0 to 1, e.g. '{sign}=0.5'")
    return float(match[2]), bool(match[1])
