"""Captions of models with recurrent layers are those of transformers' own loop, whatever shares their batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.base import ChoiceRequest, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.batched_lm import BatchedLM, SequenceRow
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.hf.kv_cache import KVCacheLayer, is_recurrent, new_cache, stateful_layers
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.models.engines.loading import EngineConfig, load_engine

from ..conftest import PLAIN
from ..hybrids import TEXT, random_hybrid, remember, write_hybrid
from .test_hf_engine import mixed

pytestmark = pytest.mark.asyncio(loop_scope="session")
IDS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}
EXACT = 1e-4  # nats; the delta rule's chunks begin elsewhere behind padding


@pytest.mark.parametrize("moe", [False, True])
async def test_batches_equal_transformers_own_loop(
    moe: bool, pictures: list[ImageInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write_hybrid(tmp_path / "model", moe))
    engine = await load_engine(EngineConfig("transformers", folder, device="cpu", max_model_len=512))
    assert isinstance(engine, TransformersEngine) and not engine.lm.family.shares
    requests = mixed(pictures)
    batches: list[int] = []
    prefill = engine.lm.prefill
    monkeypatch.setattr(engine.lm, "prefill", lambda prompts: batches.append(len(prompts)) or prefill(prompts))
    fast = await asyncio.gather(*map(engine.generate, requests))
    assert batches == [11]  # all together: a failure would have split them
    for request, completion in zip(requests, fast, strict=True):
        slow = await engine.generate_reference(request)
        assert (completion.token_ids, completion.finish_reason) == (slow.token_ids, slow.finish_reason)
        if request.logprobs:
            assert completion.logprobs == pytest.approx(slow.logprobs, abs=EXACT)
    assert len({completion.token_ids for completion in fast}) > len(fast) / 2
    prompts = [Prompt(PLAIN, image) for image in pictures[:2]]
    together = await asyncio.gather(*(engine.choose(ChoiceRequest(each, ("A", "B"))) for each in prompts))
    for each, scores in zip(prompts, together, strict=True):
        alone = await engine.choose(ChoiceRequest(each, ("A", "B")))
        assert scores.logprobs == pytest.approx(alone.logprobs, abs=EXACT)
    await engine.aclose()


def batched() -> BatchedLM:
    model = random_hybrid(IDS, vocab_size=600)
    return BatchedLM(model, None, None, frozenset({2}), 512)  # type: ignore[arg-type]


def texts(*lengths: int) -> list[PreparedPrompt]:
    torch.manual_seed(1)
    return [
        PreparedPrompt(torch.randint(8, 600, (length,)), torch.arange(length).expand(3, -1), length, None)
        for length in lengths
    ]


async def test_padding_before_a_prompt_is_read_as_nothing() -> None:
    """Also where a prompt is shorter than the convolution, and where padding moves it over the edge of a chunk."""
    lm, prompts = batched(), texts(2, 3, 4, 63, 70, 130)
    together = lm.prefill(prompts)
    for row, prompt in enumerate(prompts):
        alone = lm.prefill([prompt])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=EXACT, rtol=0)
        for ours, theirs in zip(together.cache.layers, alone.cache.layers, strict=True):
            if not isinstance(ours, KVCacheLayer):
                for one, other in (
                    (ours.conv_states, theirs.conv_states),
                    (ours.recurrent_states, theirs.recurrent_states),
                ):
                    torch.testing.assert_close(one[0][row], other[0][0], atol=1e-4, rtol=1e-4)
                assert theirs.recurrent_states[0].abs().max() > 0.01


async def test_rows_that_leave_take_their_states_with_them() -> None:
    lm, prompts = batched(), texts(9, 40, 5)
    rows = [SequenceRow(row % 3, Sampling(1.0, 1.0, 2 + 3 * (row % 4), seed=row), True) for row in range(9)]
    fast = lm.decode(lm.prefill(prompts), rows)
    assert len({len(drawn.token_ids) for drawn in fast}) > 2
    for row, drawn in zip(rows, fast, strict=True):
        slow = lm.generate_reference(prompts[row.prompt], row.sampling)
        assert (drawn.token_ids, drawn.stopped) == (slow.token_ids, slow.stopped)
        assert drawn.logprobs == pytest.approx(slow.logprobs, abs=EXACT)


async def test_a_reader_without_images_is_one_too(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of("reader"))
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, vocab_size=len(tokenizer), eos_token_id=1))
    remember(model)
    model.save_pretrained(tmp_path)
    for file in folder_of("reader").iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    engine = await load_engine(EngineConfig("transformers", str(tmp_path), device="cpu"))
    assert isinstance(engine, TransformersEngine)
    requests = [
        GenerationRequest(Prompt("A red star. " * (1 + number)), Sampling(1.0, 1.0, 6, number), True)
        for number in range(4)
    ]
    for request, fast in zip(requests, await asyncio.gather(*map(engine.generate, requests)), strict=True):
        slow = await engine.generate_reference(request)
        assert fast.token_ids == slow.token_ids and fast.logprobs == pytest.approx(slow.logprobs, abs=EXACT)
    await engine.aclose()


def unlike(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    if kind == "conv":
        return Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention"]))
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    layers = ["linear_attention", "full_attention"]
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **heads, layer_types=layers, num_experts=4))


@pytest.mark.parametrize("kind", ["conv", "linear_attention"])
async def test_running_states_of_other_families_are_refused(kind: str, tmp_path: Path) -> None:
    for file in folder_of("reader").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    unlike(kind).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=rf"running state \({kind}\), which .* for Qwen3.5 alone; take --engine") as told:
        await load_engine(EngineConfig("transformers", str(tmp_path), device="cpu"))
    assert "\n" not in str(told.value)


async def test_a_cache_of_running_states_is_known() -> None:
    config = random_hybrid(IDS, vocab_size=60).config.get_text_config()
    cache = new_cache(config, growing=False)
    assert is_recurrent(cache) and stateful_layers(cache) == []
    assert [type(layer).__name__ for layer in cache.layers] == [
        "LinearAttentionLayer",
        "KVCacheLayer",
        "LinearAttentionLayer",
    ]
    config.layer_types = ["hybrid", "full_attention", "hybrid"]  # as Falcon-H1's
    assert stateful_layers(new_cache(config, growing=False)) == ["LinearAttentionAndFullAttentionLayer"]
