"""vLLM against the transformers engine on held-out pictures, and what happens when a request or the engine dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import psutil
import pytest

from capipe.models.engines.base import (
    ChoiceRequest,
    Completion,
    Engine,
    EngineDead,
    GenerationRequest,
    ImageInput,
    Prompt,
    Rejected,
    RequestError,
    Sampling,
)
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.vllm.engine import VLLMEngine, _with_form

from ..conftest import DETAILED, MODEL, PLAIN, ROOM, many
from .test_hf_engine import bad_requests_fail_alone

pytest.importorskip("vllm")
pytestmark = pytest.mark.asyncio(loop_scope="session")


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


@pytest.mark.slow
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


@pytest.mark.slow
async def test_expanded_prompts_equal_the_processors(vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    """vLLM expands our single placeholder to just the ids that the model's own processor makes of chat and image."""
    from transformers import AutoProcessor

    from capipe.models.engines.model_folder import resolve_model

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


@pytest.mark.slow
async def test_bad_requests_fail_alone(vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    await bad_requests_fail_alone(vllm_engine, pictures[0])


COLOR = json.dumps(
    {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
)


@pytest.mark.slow
async def test_a_schema_is_kept_to(vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    """The captioner never saw JSON, so nothing but the mask can make it write any; noise must not lift the mask."""
    assert vllm_engine.guides
    samplings = [Sampling(), *(Sampling(1.0, [1.0, 0.9][seed % 2], 60, seed) for seed in range(12))]
    prompts = [Prompt(PLAIN, each) for each in pictures[:2]]
    free = [GenerationRequest(prompt, sampling) for prompt in prompts for sampling in samplings]
    guided = [GenerationRequest(each.prompt, each.sampling, json_schema=COLOR) for each in free]
    answers = await captions(vllm_engine, [each for pair in zip(free, guided, strict=True) for each in pair])
    for answer in answers[1::2]:
        assert answer.finish_reason == "stop"
        parsed = json.loads(answer.text)
        assert parsed in ({"color": "red"}, {"color": "blue"})
        assert answer.text.replace('":"', '": "') == json.dumps(parsed)
    assert len({answer.text for answer in answers[1::2]}) > 1  # it is still a draw
    for answer in answers[::2]:
        with pytest.raises(ValueError):
            json.loads(answer.text)
    again = await captions(vllm_engine, guided)
    assert [each.text for each in again] == [each.text for each in answers[1::2]]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('{"color": "red", "n": ["a", "b"]}', True),
        ('{"color":"red","n":["a","b"]}', True),
        ('{"color": "red", "n": []}', True),
        ('{"color":  "red", "n": []}', False),
        ('{"color": "red", "n": [] }', False),
        ('{"color": "red",\n"n": []}', False),
        (' {"color": "red", "n": []}', False),
    ],
)
async def test_guided_json_has_a_space_or_none(text: str, accepted: bool) -> None:
    import llguidance
    import llguidance.hf
    from transformers import AutoTokenizer

    from capipe.models.engines.model_folder import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    schema = json.loads(COLOR)
    schema["properties"]["n"] = {"type": "array", "items": {"type": "string"}}
    schema["required"].append("n")
    # With vLLM's own default for white space, which the schema must win against.
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        _with_form(json.dumps(schema)), defaults={"whitespace_flexible": True}
    )
    matcher = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer), grammar)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (matcher.validate_tokens(ids) == len(ids)) == accepted


@pytest.mark.slow
async def test_a_bad_schema_fails_its_request_alone(vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    bad = ["", "{", "[]", '{"type": "bogus"}', '{"$ref": "#/nowhere"}', '{"type": "string", "pattern": "("}']
    prompt, sampling = Prompt(PLAIN, pictures[0]), Sampling(max_tokens=20)
    good = GenerationRequest(prompt, sampling, json_schema=COLOR)
    alone = await vllm_engine.generate(good)
    requests = [*(GenerationRequest(prompt, sampling, json_schema=schema) for schema in bad), good]
    *errors, after = await asyncio.gather(*map(vllm_engine.generate, requests), return_exceptions=True)
    assert [type(each) for each in errors] == [RequestError] * 3 + [Rejected] * 3, (
        errors
    )  # the latter by vLLM's grammar
    assert after == alone


@pytest.mark.slow
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
