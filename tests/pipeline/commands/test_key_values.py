"""key=value options, and what one of a second model sets in place of the first model's."""

from __future__ import annotations

from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.pipeline.commands.options.key_values import engine_args, key_values, second_model

FIRST = {
    "gpu_memory_utilization": 0.9,
    "dtype": "auto",
    "max_pixels": 900,
    "tensor_parallel_size": 1,
    "adapter": "first",
    "engine_args": {"quantization": "fp8", "block_size": 16},
    "template_args": {"enable_thinking": False},
}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (None, {}),
        (["a=1", "b=x", "c=true", "d=null", "e="], {"a": 1, "b": "x", "c": True, "d": None, "e": ""}),
        (["a=1.5", "b=[1, 2]", 'c={"x": "y"}', 'd="7"'], {"a": 1.5, "b": [1, 2], "c": {"x": "y"}, "d": "7"}),
        (["a.b=1", "a.c.d=x"], {"a": {"b": 1, "c": {"d": "x"}}}),
        (["a=b=c", "u=http://x/y?z=1"], {"a": "b=c", "u": "http://x/y?z=1"}),
        (["a=NaN", "b=Infinity"], {"a": "NaN", "b": "Infinity"}),  # no JSON, and nothing that a fingerprint could hold
    ],
)
def test_values_are_json_where_they_parse(texts: list[str] | None, expected: dict[str, Any]) -> None:
    assert key_values("--x-arg", texts) == expected


@pytest.mark.parametrize("text", ["", "novalue", "=1", "1a=2", "a b=1", "a.=1", ".a=1", "a..b=1", "é=1"])
def test_what_is_no_key_value_is_one_line(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--x-arg .*write key=value") as caught:
        key_values("--x-arg", [text])
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", [["a=1", "a=2"], ["a.b=1", "a.b=2"], ["a=1", "a.b=2"], ["a.b=1", "a=2"]])
def test_a_key_that_is_given_twice(texts: list[str]) -> None:
    with pytest.raises(BadInput, match=r"twice|has a value already"):
        key_values("--x-arg", texts)


def test_vllms_names_may_be_written_as_on_its_command_line() -> None:
    assert engine_args("--engine-arg", ["max-num-seqs=4", "hf_overrides.rope-x=1"]) == {
        "max_num_seqs": 4,
        "hf_overrides": {"rope-x": 1},
    }
    with pytest.raises(BadInput, match="given twice"):
        engine_args("--engine-arg", ["block-size=1", "block_size=2"])


def test_another_model_has_the_shared_options_and_none_of_the_first_ones_own() -> None:
    made = second_model("--screen-arg", FIRST, ["gpu-memory=0.35", "max-pixels=400", "dtype=bfloat16"], same=False)
    assert made == {
        "gpu_memory_utilization": 0.35,
        "dtype": "bfloat16",
        "max_pixels": 400,
        "tensor_parallel_size": 1,
        "adapter": "",
        "engine_args": {},
        "template_args": {},
    }
    assert FIRST["engine_args"] == {"quantization": "fp8", "block_size": 16}


def test_the_same_model_keeps_them() -> None:
    made = second_model("--screen-arg", FIRST, ["block-size=32", "template.tools=[]"], same=True)
    assert made["engine_args"] == {"quantization": "fp8", "block_size": 32}
    assert made["template_args"] == {"enable_thinking": False, "tools": []}
    assert made["adapter"] == "first"


def test_all_other_keys_are_vllms() -> None:
    given = ["kv_cache_dtype=fp8", "hf_overrides.a=1", "tensor-parallel=2", "timeout=9", "adapter=mine"]
    made = second_model("--reader-arg", FIRST, given, same=False, sees=False)
    assert made["engine_args"] == {"kv_cache_dtype": "fp8", "hf_overrides": {"a": 1}}
    assert (made["tensor_parallel_size"], made["timeout_s"], made["adapter"]) == (2, 9.0, "mine")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gpu-memory=lots", "--reader-arg gpu-memory=lots: must be a number"),
        ("max-model-len=1.5", "must be a whole number"),
        ("concurrency=true", "must be a whole number"),
        ("template=x", "write --reader-arg template.KEY=value"),
        ("max-pixels=400", "reads text alone"),
        ("decode-workers=4", "reads text alone"),
    ],
)
def test_what_a_second_model_cannot_take(text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        second_model("--reader-arg", FIRST, [text], same=False, sees=False)
