"""vLLM against the transformers engine on held-out pictures, and what happens when a request or the engine dies."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import psutil
import pytest

from capipe.models.engine import (
    ChoiceRequest,
    Completion,
    Engine,
    EngineDead,
    GenerationRequest,
    ImageInput,
    Prompt,
    Sampling,
)
from capipe.models.loading import EngineConfig, load_engine
from capipe.models.transformers_engine import TransformersEngine
from capipe.models.vllm_engine import VLLMEngine

from .conftest import DETAILED, MODEL, PLAIN, ROOM, many
from .test_transformers_engine import bad_requests_fail_alone

pytest.importorskip("vllm")
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def captions(engine: Engine, requests: list[GenerationRequest]) -> list[Completion]:
    return await asyncio.gather(*map(engine.generate, requests))


async def test_greedy_captions_agree(
    vllm_engine: Engine, reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    requests = [
        GenerationRequest(Prompt(DETAILED, each), Sampling(max_tokens=ROOM), logprobs=True) for each in pictures
    ]
    ours, theirs = await captions(reference, requests), await captions(vllm_engine, requests)
    same = [(one, other) for one, other in zip(ours, theirs, strict=True) if one.token_ids == other.token_ids]
    assert len(same) >= len(pictures) - 1  # two likeliest tokens can be equal to within rounding
    for one, other in same:
        assert (one.text, one.finish_reason, one.n_tokens) == (other.text, other.finish_reason, other.n_tokens)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


async def test_sampled_draws_agree_whatever_shares_the_batch(
    vllm_engine: Engine, reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    requests = [
        GenerationRequest(Prompt(PLAIN, image), Sampling(1.0, 0.9 if index % 3 == 0 else 1.0, 40, seed=index))
        for index, image in enumerate(pictures[:12] * 2)
    ]
    theirs = await captions(vllm_engine, requests)
    ours = await captions(reference, requests)
    alone = [await vllm_engine.generate(each) for each in requests]
    assert sum(one.text == other.text for one, other in zip(theirs, ours, strict=True)) >= len(requests) - 1
    assert sum(one.text == other.text for one, other in zip(theirs, alone, strict=True)) >= len(requests) - 1
    assert len({each.text for each in theirs}) > 12  # seeds matter: the same picture came up twice


async def test_choices_agree(vllm_engine: Engine, reference: TransformersEngine, pictures: list[ImageInput]) -> None:
    prompts = [Prompt(PLAIN, each, answer_prefix="The image shows ") for each in pictures[:10]] + [Prompt("Say.")]
    requests = [ChoiceRequest(each, ("a", "b", "c", "d")) for each in prompts]
    theirs = await asyncio.gather(*map(vllm_engine.choose, requests))
    ours = await asyncio.gather(*map(reference.choose, requests))
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


async def test_expanded_prompts_equal_the_processors(vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    """vLLM expands our single placeholder to just the ids that the model's own processor makes of chat and image."""
    from transformers import AutoProcessor

    from capipe.models.loading import resolve_model

    assert isinstance(vllm_engine, VLLMEngine)
    processor: Any = AutoProcessor.from_pretrained(resolve_model(MODEL))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PLAIN}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    wanted = processor(text=[text], images=[pictures[0].pixels])["input_ids"][0]
    llm = vllm_engine._llm
    assert llm is not None
    prompt = vllm_engine._vllm_prompt(Prompt(PLAIN, pictures[0]))
    (rendered,) = await llm.renderer.render_cmpl_async([prompt])
    assert rendered["prompt_token_ids"] == list(wanted)
    assert rendered["mm_hashes"] == {"image": [pictures[0].uid]}  # the uid is the identity; no pixels were hashed


async def test_bad_requests_fail_alone(vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    await bad_requests_fail_alone(vllm_engine, pictures[0])


async def test_a_killed_engine_process_fails_all_in_flight(pictures: list[ImageInput]) -> None:
    engine = await load_engine(EngineConfig("vllm", MODEL, max_model_len=ROOM, concurrency=4))
    assert isinstance(engine, VLLMEngine)
    assert isinstance(engine, Engine)
    processes = list(engine._processes)
    core = next(each for each in processes if "EngineCore" in each.name())
    tasks = [asyncio.create_task(engine.generate(each)) for each in many(pictures)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    os.kill(core.pid, signal.SIGKILL)
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert {type(each) for each in outcomes} <= {EngineDead, Completion}
    assert sum(isinstance(each, EngineDead) for each in outcomes) > len(tasks) // 2
    with pytest.raises(EngineDead):
        await engine.generate(GenerationRequest(Prompt(PLAIN)))
    await engine.aclose()
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)
