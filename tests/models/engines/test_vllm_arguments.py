"""Arguments for vLLM: known ones pass, others are one line with the way out, and rows count in the fingerprint."""

from __future__ import annotations

from dataclasses import fields

import pytest

from capipe.errors import BadInput
from capipe.models.engines.loading import EngineConfig
from capipe.models.engines.model_folder import resolve_model
from capipe.models.engines.vllm import arguments
from capipe.models.engines.vllm.arguments import changing_rows, check_engine_args, refuse_unknown

from ..conftest import GRID, MODEL


def test_unknown_names_come_with_the_closest_one() -> None:
    known = ("max_num_batched_tokens", "block_size", "quantization")
    refuse_unknown(["block_size"], known)
    with pytest.raises(BadInput) as caught:
        refuse_unknown(["quantisation", "zzz", "block_size"], known)
    assert str(caught.value) == (
        "engine arguments that vLLM does not know: quantisation (did you mean quantization?), zzz"
    )


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("model", "--model"),
        ("dtype", "--dtype"),
        ("max_model_len", "--max-model-len"),
        ("max_num_seqs", "--concurrency"),
        ("tensor_parallel_size", "--tensor-parallel"),
        ("gpu_memory_utilization", "--gpu-memory"),
        ("mm_processor_kwargs", "--max-pixels"),
        ("enable_lora", "--adapter"),
    ],
)
def test_what_has_an_option_is_named_by_it(name: str, option: str) -> None:
    with pytest.raises(BadInput, match=f"engine argument {name}: capipe sets it itself; give {option}"):
        EngineConfig("vllm", "m", engine_args={name: 1})


def test_what_requests_rely_on_stays() -> None:
    with pytest.raises(BadInput, match="limit_mm_per_prompt: capipe sets it itself, since every prompt has one image"):
        EngineConfig("auto", "m", engine_args={"limit_mm_per_prompt": {"image": 4}})


@pytest.mark.parametrize("kind", ["transformers", "http://127.0.0.1:9"])
def test_other_engines_take_none(kind: str) -> None:
    with pytest.raises(BadInput, match="engine argument block_size: these are vLLM's"):
        EngineConfig(kind, "m", engine_args={"block_size": 16})
    with pytest.raises(BadInput, match="--tensor-parallel 2: is for vLLM"):
        EngineConfig(kind, "m", tensor_parallel_size=2)


def test_speed_has_no_part_in_rows_and_all_else_has() -> None:
    rows = {"quantization": "fp8", "kv_cache_dtype": "fp8", "hf_overrides": {"a": 1}, "speculative_config": {"b": 2}}
    speed = {"max_num_batched_tokens": 9, "enforce_eager": True, "numa_bind": True, "block_size": 16, "swap_space": 4}
    assert changing_rows({**rows, **speed, "compilation_config": {"mode": 0}}) == rows
    assert changing_rows({"an_argument_of_next_year": 1, "load_format": "dummy"}) == {
        "an_argument_of_next_year": 1,
        "load_format": "dummy",
    }


def test_vllm_itself_is_asked() -> None:
    pytest.importorskip("vllm")
    check_engine_args({"block_size": 16, "compilation_config": {"mode": 0}, "enforce_eager": True})
    with pytest.raises(BadInput, match=r"max_num_batched_token \(did you mean max_num_batched_tokens\?\)"):
        check_engine_args({"max_num_batched_token": 5})
    with pytest.raises(BadInput, match=r"engine arguments that vLLM does not take: .*foo") as caught:
        check_engine_args({"compilation_config": {"foo": 1}})
    assert "\n" not in str(caught.value)


def test_the_lists_name_what_vllm_has() -> None:
    """One that vLLM renames would be handed on, and its refusal would name no option of ours."""
    vllm = pytest.importorskip("vllm")
    known = {field.name for field in fields(vllm.AsyncEngineArgs)}
    assert not {*arguments.OURS, *arguments.FIXED} - known


@pytest.mark.parametrize(("given", "expected"), [({}, 4096), ({"max_num_batched_tokens": 1024, "seed": 3}, 1024)])
def test_batches_are_those_of_vllms_offline_use(given: dict[str, int], expected: int) -> None:
    """2,048 tokens, which a server's default is, read one image of 1,280 tokens at a time."""
    pytest.importorskip("vllm")
    from capipe.models.engines.vllm.config import VLLMOptions, engine_config

    options = VLLMOptions(str(resolve_model(MODEL)), GRID, max_model_len=512, engine_args=given)
    config = engine_config(options, on_cpu=True, concurrency=64)
    assert config.scheduler_config.max_num_batched_tokens == expected
    assert config.scheduler_config.max_num_seqs == 64
    assert config.model_config.max_model_len == 512


def test_the_cache_of_a_cpu_holds_one_whole_request() -> None:
    pytest.importorskip("vllm")
    from capipe.models.engines.vllm.config import CPU_CACHE_BYTES, VLLMOptions, engine_config, request_bytes

    options = VLLMOptions(str(resolve_model(MODEL)), GRID, max_model_len=512)
    config = engine_config(options, on_cpu=True, concurrency=4)
    text = config.model_config.hf_text_config
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert request_bytes(config) == 2 * text.num_hidden_layers * width * 4 * (512 + 32)  # float32
    assert config.cache_config.kv_cache_memory_bytes == CPU_CACHE_BYTES
    config.model_config.max_model_len = 10_000_000
    assert request_bytes(config) > CPU_CACHE_BYTES


def test_what_vllm_refuses_of_the_users_is_bad_input() -> None:
    pytest.importorskip("vllm")
    from capipe.models.engines.vllm.config import VLLMOptions, engine_config

    options = VLLMOptions(str(resolve_model(MODEL)), GRID, engine_args={"quantization": "no-such"})
    with pytest.raises(BadInput, match=r"vLLM refuses its settings, with the engine arguments quantization='no-such'"):
        engine_config(options, on_cpu=True, concurrency=4)
