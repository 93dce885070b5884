"""The HTTP engine against a real vLLM server: the captions of the in-process engine, from the files' own bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import pytest

from capipe.models.engines.base import (
    ChoiceRequest,
    Engine,
    GenerationRequest,
    ImageInput,
    Prompt,
    RequestError,
    Sampling,
)
from capipe.models.engines.loading import EngineConfig, load_engine, model_identity
from capipe.models.engines.model_folder import resolve_model

from ...serving import serving
from ..conftest import DETAILED, MODEL, PLAIN, ROOM
from .test_vllm_engine import COLOR

pytest.importorskip("vllm")
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


@pytest.fixture(scope="module")
def server(unused_tcp_port_factory: Callable[[], int]) -> Iterator[str]:
    arguments = ["--served-model-name", "captioner", "--max-model-len", str(ROOM), "--max-num-seqs", "16"]
    arguments += ["--max-logprobs", "5"]  # it is asked for 20 first
    arguments += ["--trust-request-mm-kwargs"]  # or it refuses requests with a pixel cap
    # Guided or not, the captioner would rather write white space without end than JSON, which it never saw.
    arguments += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    with serving(str(resolve_model(MODEL)), unused_tcp_port_factory(), *arguments) as url:
        yield url


async def test_a_real_server_writes_the_same(server: str, vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    engine = await load_engine(EngineConfig(server, max_pixels=112 * 112, concurrency=16))
    # 112 pixels a side as the corpus has them: nothing to resize, so both sides see the very same pixels.
    prompts = [Prompt(DETAILED, each) for each in pictures[:16]] + [Prompt(PLAIN, pictures[0], answer_prefix="The")]
    requests = [GenerationRequest(each, Sampling(max_tokens=100), logprobs=True) for each in prompts]
    here = await asyncio.gather(*map(vllm_engine.generate, requests))
    there = await asyncio.gather(*map(engine.generate, requests))
    same = [(one, other) for one, other in zip(here, there, strict=True) if one.text == other.text]
    assert len(same) >= len(requests) - 1
    for one, other in same:
        assert (one.finish_reason, one.n_tokens) == (other.finish_reason, other.n_tokens)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    first = (await vllm_engine.generate(GenerationRequest(prompts[0], Sampling(max_tokens=1)))).text
    asked = ChoiceRequest(prompts[0], (first, "no token at all"))
    scores = await engine.choose(asked)
    expected = await vllm_engine.choose(ChoiceRequest(prompts[0], (first,)))
    assert scores.logprobs[0] == pytest.approx(expected.logprobs[0], abs=1e-3)
    assert (scores.logprobs[1], scores.best) == (None, 0)
    with pytest.raises(RequestError, match="HTTP 400"):
        await engine.generate(GenerationRequest(Prompt("word " * 2 * ROOM)))
    guided = GenerationRequest(prompts[0], Sampling(max_tokens=100), json_schema=COLOR)
    assert json.loads((await engine.generate(guided)).text) in ({"color": "red"}, {"color": "blue"})
    with pytest.raises(RequestError, match="HTTP 400"):
        await engine.generate(GenerationRequest(prompts[0], json_schema='{"type": "bogus"}'))
    assert model_identity("", server).name == "captioner"
    await engine.aclose()


async def test_two_urls_are_one_engine(server: str, pictures: list[ImageInput]) -> None:
    both = f"{server},{server.replace('127.0.0.1', 'localhost')}"
    requests = [GenerationRequest(Prompt(DETAILED, each), Sampling(max_tokens=60)) for each in pictures[:40]]
    one, routed = await load_engine(EngineConfig(server, concurrency=16)), await load_engine(EngineConfig(both))
    alone, together = [
        [answer.text for answer in await asyncio.gather(*map(engine.generate, requests))] for engine in (one, routed)
    ]
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= len(requests) - 2  # batches differ in last bits
    assert model_identity("", both) == model_identity("", server)
    await one.aclose()
    await routed.aclose()
