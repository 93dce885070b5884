"""vLLM arguments given by users (``--engine-arg key=value``): which are refused, and which can change rows."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ....errors import BadInput

#: Arguments that capipe sets itself, with the option that sets them.
OURS: Mapping[str, str] = {
    "model": "--model",
    "model_weights": "--model",
    "tokenizer": "--model, whose folder has the tokenizer",
    "revision": "--model",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--concurrency",
    "gpu_memory_utilization": "--gpu-memory",
    "tensor_parallel_size": "--tensor-parallel",
    "pipeline_parallel_size": "--tensor-parallel",
    "data_parallel_size": "--gpus: there is one engine per GPU",
    "device_ids": "--gpus",
    "mm_processor_kwargs": "--max-pixels and --min-pixels",
    "enable_lora": "--adapter",
    "max_lora_rank": "--adapter",
    "default_mm_loras": "--adapter",
    "seed": "--seed",
}
#: Arguments that capipe's requests depend on, with the reason.
FIXED: Mapping[str, str] = {
    "limit_mm_per_prompt": "every prompt has one image at most",
    "language_model_only": "images are part of the prompts",
    "skip_tokenizer_init": "prompts are rendered with the tokenizer",
    "structured_outputs_config": "quiz questions are held to JSON by it",
    "runner": "captions are generated",
    "convert": "captions are generated",
    "logprobs_mode": "scores are log-probabilities of the untempered model",
    "worker_extension_cls": "training loads its weights through it",
    "enable_sleep_mode": "training decides about it (rollout.sleep)",
    "served_model_name": "nothing is served",
    "trust_remote_code": "a model's own code is not run",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Arguments that change speed, memory or logging and never a row. All others are part of the fingerprint. (That sums in
#: another order differ in their last bits is true of all of these, and of batches anyway.)
SPEED = _names(
    """
    max_num_batched_tokens max_num_scheduled_tokens long_prefill_token_threshold long_prefill_token_threshold_adaptive
    max_num_partial_prefills max_long_partial_prefills max_num_active_seqs max_num_queued_reqs max_num_queued_tokens
    prefill_schedule_interval scheduler_reserve_full_isl scheduling_policy async_scheduling stream_interval
    enable_chunked_prefill disable_chunked_mm_input performance_mode optimization_level
    enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size cudagraph_metrics
    block_size swap_space num_gpu_blocks_override kv_cache_memory_bytes enable_prefix_caching prefix_caching_hash_algo
    prefix_cache_retention_interval prefix_match_unit kv_offloading_size kv_offloading_backend cpu_offload_gb
    cpu_offload_params offload_backend offload_group_size offload_num_in_group offload_prefetch_step offload_params
    numa_bind numa_bind_nodes numa_bind_cpus distributed_executor_backend distributed_timeout_seconds
    cpu_distributed_timeout_seconds disable_custom_all_reduce max_parallel_loading_workers enable_shm_tensor_arena
    mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_hasher_algorithm mm_encoder_tp_mode
    mm_tensor_ipc mm_ipc_gpu_memory_gb skip_mm_profiling renderer_num_workers
    safetensors_load_strategy safetensors_prefetch_num_threads download_dir use_tqdm_on_load
    disable_log_stats aggregate_engine_logging enable_log_requests log_level log_config_file logging_config
    otlp_traces_endpoint collect_detailed_traces kv_cache_metrics kv_cache_metrics_sample enable_mfu_metrics
    enable_mm_processor_stats enable_logging_iteration_details enable_layerwise_nvtx_tracing profiler_config
    enable_cumem_allocator ray_workers_use_nsight
    """
)
_CLOSE = 0.6  # minimum similarity of a suggested name, 0 to 1


def refuse_ours(given: Iterable[str]) -> None:
    """Raise BadInput for an argument that is set in another way, or not at all. Needs no vLLM."""
    for name in given:
        if name in OURS:
            raise BadInput(f"engine argument {name}: capipe sets it itself; give {OURS[name]}")
        if name in FIXED:
            raise BadInput(f"engine argument {name}: capipe sets it itself, since {FIXED[name]}; leave it out")


def check_engine_args(given: Mapping[str, Any]) -> None:
    """Raise BadInput for arguments that vLLM does not know, or with values that it does not accept.

    Imports vLLM (some seconds) where it is installed; otherwise nothing can be checked yet.
    """
    refuse_ours(given)
    if not given or importlib.util.find_spec("vllm") is None:
        return
    from .environment import prepare_environment

    prepare_environment()
    from vllm import AsyncEngineArgs

    known = {field.name for field in fields(AsyncEngineArgs) if not field.name.startswith("_")}
    refuse_unknown(given, known)
    try:
        # vLLM looks its model up at once (a default one if none is named), even offline; a folder is taken as it is.
        AsyncEngineArgs(model=str(Path(__file__).parent), **given)
    except Exception as error:  # pydantic's and vLLM's own errors, which share no class
        raise BadInput(f"engine arguments that vLLM does not take: {reason_of(error)}") from None


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise BadInput naming those of ``given`` that are not ``known``, each with the closest known name."""
    names = sorted(known)
    unknown = [name for name in given if name not in names]
    if unknown:
        named = []
        for name in unknown:
            close = difflib.get_close_matches(name, names, n=1, cutoff=_CLOSE)
            named.append(f"{name} (did you mean {close[0]}?)" if close else name)
        raise BadInput(f"engine arguments that vLLM does not know: {', '.join(named)}")


def changing_rows(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a fingerprint has to cover: all but those of :data:`SPEED`."""
    return {name: value for name, value in given.items() if name not in SPEED}


def reason_of(error: Exception) -> str:
    """The line of an error that states the problem."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic: a headline with the count, the argument's name, then what is wrong with it
    if len(lines) > 2 and "validation error" in lines[0]:
        return f"{lines[1]}: {lines[2].partition(' [type=')[0]}"
    return (lines or [repr(error)])[0]


def in_words(given: Mapping[str, Any]) -> str:
    """Arguments as text, in the form in which they are given."""
    return ", ".join(f"{name}={value!r}" for name, value in given.items())
