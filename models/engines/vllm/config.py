"""vLLM's configuration: our settings, overridden by the user's own arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import BadInput
from ...images.grid import ImageGrid
from .arguments import in_words, reason_of
from .weight_sync import EXTENSION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GIB = 1 << 30
CPU_CACHE_BYTES = GIB  # vLLM's own default is a large share of the machine's memory
CPU_BLOCK_TOKENS = 32  # its default on a CPU, 128, is longer than a small image's prompt, which then is never shared
TRAINED_BATCH_TOKENS = 8192  # per batch beside a policy that shares the GPU; vLLM's own default is twice as many
# The one of vLLM's guided decoding backends whose whitespace can be set with the schema. vLLM's own choices are
# unlimited white space, in which a model may get stuck, or none at all, which forbids what json.dumps writes.
GUIDANCE_BACKEND = "guidance"


@dataclass(frozen=True)
class VLLMOptions:
    """``concurrency``: sequences in the running batch. ``gpu_memory_utilization``: a share of the GPU's memory, 0 to 1.

    ``engine_args``: the user's own, by vLLM's names; they override ours. ``trained``: the model is being trained, in
    this process: it receives new weights, may sleep on a GPU, and reserves no core for itself. ``transfer``: vLLM's
    own way of sending them (:mod:`.weight_transfer`), None where they come through a folder.
    """

    path: str
    grid: ImageGrid | None
    dtype: str = "auto"
    max_model_len: int | None = None
    concurrency: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    trained: bool = False
    transfer: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    engine_args: Mapping[str, Any] = field(default_factory=dict)


def engine_config(options: VLLMOptions, on_cpu: bool, concurrency: int) -> VllmConfig:
    """vLLM's configuration, as for its own offline use: its default is small batches, for a server's latency."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = {**_arguments(options, on_cpu, concurrency), **options.engine_args}
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config(usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        if not options.engine_args:
            raise
        user_args, reason = in_words(options.engine_args), reason_of(error)
        raise BadInput(f"vLLM refuses its settings, with the engine arguments {user_args}: {reason}") from error
    if on_cpu and "kv_cache_memory_bytes" not in options.engine_args:
        config.cache_config.kv_cache_memory_bytes = max(CPU_CACHE_BYTES, request_bytes(config))
    return config


def request_bytes(config: VllmConfig) -> int:
    """Bytes of keys and values of one request that fills the context, which vLLM requires before it starts."""
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    tokens = model.max_model_len + config.cache_config.block_size
    return int(2 * heads * model.get_head_size() * model.dtype.itemsize * tokens)


def _arguments(options: VLLMOptions, on_cpu: bool, concurrency: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": options.path,
        "dtype": ("float32" if on_cpu else "bfloat16") if options.dtype == "auto" else options.dtype,
        "max_num_seqs": concurrency,
        "max_model_len": options.max_model_len,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_prefix_caching": True,  # the prompts of one image, and a caption's questions, share their beginning
        "structured_outputs_config": {"backend": GUIDANCE_BACKEND},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    if options.trained:
        arguments |= {"worker_extension_cls": EXTENSION, "enable_sleep_mode": not on_cpu}
        arguments |= {} if on_cpu else {"max_num_batched_tokens": TRAINED_BATCH_TOKENS}
        arguments |= {} if options.transfer is None else {"weight_transfer_config": {"backend": options.transfer}}
    if options.tensor_parallel_size > 1:
        arguments["distributed_executor_backend"] = "mp"  # otherwise vLLM may use Ray, whose worker this process may be
    if on_cpu:  # compiling makes nothing faster here, and costs ten to twenty seconds at every start
        arguments |= {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "block_size": CPU_BLOCK_TOKENS, "enforce_eager": True}
    else:
        arguments |= {"gpu_memory_utilization": options.gpu_memory_utilization}
    if options.grid is not None:
        size = {"shortest_edge": options.grid.min_pixels, "longest_edge": options.grid.max_pixels}
        arguments |= {
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "mm_processor_kwargs": {"size": size},
            "mm_processor_cache_gb": 0,  # an image is processed once; its prompts share it through the prefix
        }
    return arguments
