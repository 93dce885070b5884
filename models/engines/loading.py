"""Loading of engines: from a bundled model, folder, hub id or server URL to a running engine and the model's identity.

Heavy imports happen inside the functions, so that a command's ``--help`` needs none of them.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import BadInput, RunFailed
from ...manifests.import_path import import_object, is_import_path
from ..bundled import resolve as resolve_bundled
from ..images.grid import ImageGrid
from ..own_code import NEEDS_CODE, reason_in_words
from .base import Engine, Sampling
from .captioner_registry import kind_of
from .context import context_length
from .decoding import no_extensions
from .model_folder import content_digest, folder_digest, image_grid, resolve_model
from .vllm.arguments import in_words, refuse_ours

KINDS = ("auto", "vllm", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# vLLM's and torch's messages for too little memory; for an engine process that failed, the reason is further up.
NO_MEMORY = re.compile(r"out of memory|KV cache|cache blocks|Free memory on device", re.IGNORECASE)
FAILED_ABOVE = "engine core init"
LESS_MEMORY = "give a smaller --max-model-len or --max-pixels, or another --gpu-memory"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """Which engine, which model, within what limits. Raises BadInput for values that cannot be valid.

    ``kind``: ``auto``, ``vllm``, ``transformers``, an import path (:func:`load_engine`) or comma-separated URLs of
    servers; with URLs, ``model=""`` takes what they serve, and ``concurrency`` is per server (adaptive where None).
    ``concurrency``: the engine's own where None. ``max_model_len``: None for the tokens of the largest image and of
    ``room`` (text and answer beside it), or the model's own without ``room``. ``timeout_s``: per HTTP attempt.
    ``device``: ``auto``, or where the transformers engine runs (``cpu``, ``cuda``, ``cuda:1``). ``template_args``: chat
    template arguments besides the chat (``{"enable_thinking": False}``). ``engine_args``: vLLM's, by its own names.
    ``adapter``: a peft folder, or empty.
    """

    kind: str = "auto"
    model: str = ""
    dtype: str = "auto"
    max_model_len: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    concurrency: int | None = None
    device: str = "auto"
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    timeout_s: float = 300.0
    room: int | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not self.model and not self.is_http:
            raise BadInput("no model is named; give --model a bundled one (tiny/captioner), a folder or a hub id")
        check_dtype(self.dtype)
        if self.kind == "vllm" and self.device != "auto":
            raise BadInput(f"device {self.device!r} is for --engine transformers; vLLM heeds CUDA_VISIBLE_DEVICES")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise BadInput(f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}")
        for name in ("max_model_len", "min_pixels", "max_pixels", "concurrency", "tensor_parallel_size", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadInput(f"{name} must be above 0, not {value}")
        self._refuse_vllm_only()

    def _refuse_vllm_only(self) -> None:
        if self.is_http and self.adapter:
            raise BadInput(
                f"--adapter {self.adapter}: a server loads its own; serve it there and name it by --model "
                "(vllm serve MODEL --enable-lora --lora-modules NAME=FOLDER, then --model NAME)"
            )
        if self.is_http or self.is_own or self.kind == "transformers":
            other = "a server has its own" if self.is_http else f"--engine {self.kind} has none"
            if self.engine_args:
                raise BadInput(f"engine argument {next(iter(self.engine_args))}: these are vLLM's, and {other}")
            if self.tensor_parallel_size > 1:
                where = "when it is started" if self.is_http else "with --engine vllm"
                raise BadInput(f"--tensor-parallel {self.tensor_parallel_size}: is for vLLM; give it {where}")
        refuse_ours(self.engine_args)

    @property
    def is_own(self) -> bool:
        """A user's own engine, by an import path; only it knows what its model names mean."""
        return is_import_path(self.kind)

    @property
    def is_http(self) -> bool:
        return self.kind.startswith(("http://", "https://"))

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' URLs. Raises BadInput for an invalid one."""
        from .http.server import server_urls

        return server_urls(self.kind)


def check_kind(kind: str) -> None:
    """Raise BadInput for what is neither an engine nor URLs of servers."""
    if kind.startswith(("http://", "https://")):
        from .http.server import server_urls

        server_urls(kind)
    elif is_import_path(kind):
        _maker(kind)
    elif kind not in KINDS:
        raise BadInput(f"--engine {kind!r} is none of {', '.join(KINDS)} and no http:// or https:// URL")


def _maker(kind: str) -> Callable[[EngineConfig], Engine | Awaitable[Engine]]:
    """The factory of a user's own engine. Raises BadInput."""
    maker = import_object(kind)
    if not callable(maker):
        raise BadInput(f"--engine {kind}: a {type(maker).__name__}, not a function that makes an engine")
    return maker  # type: ignore[no-any-return]


def check_dtype(name: str) -> None:
    """Raise BadInput for an unknown dtype of an engine or a scorer."""
    if name not in DTYPES:
        raise BadInput(f"dtype {name!r} is none of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class ModelIdentity:
    """``digest``: sha256 of the folder's content, a hub snapshot's commit, or None where a server hides it."""

    name: str
    digest: str | None


async def load_engine(config: EngineConfig) -> Engine:
    """Start the engine; returns when it can take requests. vLLM's start blocks the event loop for some seconds.

    An import path names a function or coroutine function that makes an engine from a config.
    """
    if config.is_http:
        return await _load_http(config)
    if config.is_own:
        return await _load_own(config)
    path = resolve_model(config.model)
    grid = image_grid(path, config.min_pixels, config.max_pixels)
    kind = kind_of(path)
    if kind is not None and config.kind == "vllm":
        raise BadInput(f"{config.model}: {kind.architecture} runs by --engine transformers alone, not by vllm")
    by_vllm = config.kind == "vllm" or (
        kind is None and config.kind == "auto" and config.device == "auto" and vllm_runs()
    )
    if not by_vllm and (config.engine_args or config.tensor_parallel_size > 1):
        option = "--engine-arg" if config.engine_args else "--tensor-parallel"
        why = "does not run here" if kind is None else f"does not know {kind.architecture}"
        raise BadInput(f"{option}: is for vLLM, which {why}")
    context = config.max_model_len or context_length(path, grid, config.room)
    if config.adapter:
        from .lora import merged_folder

        path = merged_folder(path, Path(config.adapter), config.dtype)
    load = _load_vllm if by_vllm else _load_transformers
    return load(config, path, grid, context)


async def _load_own(config: EngineConfig) -> Engine:
    result = _maker(config.kind)(config)
    engine = await result if inspect.isawaitable(result) else result
    if not isinstance(engine, Engine):
        raise BadInput(f"--engine {config.kind}: made a {type(engine).__name__}, which lacks methods of an Engine")
    return engine


async def _load_http(config: EngineConfig) -> Engine:
    from .http.engine import HTTPOptions
    from .router import connect_servers

    options = HTTPOptions(
        url=config.urls[0],
        model=config.model,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        template_args=config.template_args,
    )
    return await connect_servers(options, config.urls)


def _load_vllm(config: EngineConfig, path: Path, grid: ImageGrid | None, context: int | None) -> Engine:
    from ..pretrained import check_weights
    from .vllm.config import VLLMOptions
    from .vllm.engine import start_vllm_engine

    check_weights(path, config.model)  # vLLM itself does not notice when a part of a packed weight is missing
    options = VLLMOptions(
        path=str(path),
        grid=grid,
        dtype=config.dtype,
        max_model_len=context,
        concurrency=config.concurrency,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel_size=config.tensor_parallel_size,
        template_args=config.template_args,
        engine_args=config.engine_args,
    )
    try:
        return start_vllm_engine(options)
    except BadInput:
        raise
    except Exception as error:  # anything from a missing library to a GPU without memory
        if NEEDS_CODE in str(error):
            raise BadInput(f"{path} does not load as a model: {reason_in_words(error)}") from error
        reason = f"{type(error).__name__}: {error}"
        arguments = f" with {in_words(config.engine_args)}" if config.engine_args else ""
        raise RunFailed(f"vLLM could not start on {path}{arguments} ({reason}); {advice(reason)}") from error


def advice(reason: str) -> str:
    """Advice for an engine that did not start for this reason."""
    if NO_MEMORY.search(reason):
        return LESS_MEMORY
    if FAILED_ABOVE in reason.lower():
        return f"the lines above say why: where it is memory, {LESS_MEMORY}"
    return "--engine transformers does without it"


def _load_transformers(config: EngineConfig, path: Path, grid: ImageGrid | None, context: int | None) -> Engine:
    import torch

    from .hf.engine import load_transformers_engine

    try:
        return load_transformers_engine(
            str(path),
            called=config.model,
            grid=grid,
            dtype=config.dtype,
            device=config.device,
            max_model_len=context,
            concurrency=config.concurrency,
            template_args=config.template_args,
        )
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(
            f"{path} does not fit into the GPU's memory ({reason}); give --dtype bfloat16, or other --gpus"
        ) from error
    except (OSError, ValueError) as error:  # raised by transformers for missing files and unknown models
        raise BadInput(f"{path} does not load as a model: {reason_in_words(error, whole=True)}") from error


def vllm_runs() -> bool:
    """Whether vLLM is installed and finds a platform it was built for. Logs why not where it is installed."""
    if importlib.util.find_spec("vllm") is None:
        return False
    from .vllm.environment import prepare_environment

    prepare_environment()
    try:
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: F401 (its import is what fails beside a wrong torch)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        logger.warning("vLLM is installed but does not import (%s: %s)", type(error).__name__, error)
        return False
    return not current_platform.is_unspecified()


def check_servers(config: EngineConfig, sampling: Sampling) -> None:
    """Ask the servers of ``config`` what they are, where ``sampling`` needs more than OpenAI's fields. Raises BadInput.

    Engines of other kinds are known without asking.
    """
    from .http.server import takes_extensions

    why = no_extensions(sampling) if config.is_http else None
    if why is not None and not takes_extensions(config.kind, config.model):
        raise BadInput(why)


def model_identity(model: str, kind: str = "auto") -> ModelIdentity:
    """Model identity for fingerprints. Asks servers for their model where ``kind`` is URLs and no model is named."""
    if kind.startswith(("http://", "https://")):
        from .http.server import served_model

        return ModelIdentity(model or served_model(kind), None)
    if is_import_path(kind):
        return ModelIdentity(model, None)
    return ModelIdentity(model, content_digest(resolve_model(model)))


def same_model(first: ModelIdentity, second: ModelIdentity) -> bool:
    """Whether two names mean the same model: by content, or by name where a server hides the content of either."""
    ours, theirs = _known_digest(first), _known_digest(second)
    if ours is None or theirs is None:
        return first.name == second.name
    if len(ours) != len(theirs):  # a snapshot's commit and a folder's digest, maybe of a copy of that snapshot
        ours, theirs = (folder_digest(resolve_model(identity.name)) for identity in (first, second))
    return ours == theirs


def _known_digest(identity: ModelIdentity) -> str | None:
    """The digest, also where a server's model name is a folder that exists here."""
    if identity.digest is not None:
        return identity.digest
    try:
        path = Path(resolve_bundled(identity.name)).expanduser()
    except ValueError:
        return None
    return folder_digest(path.resolve()) if (path / "config.json").is_file() else None
