"""Captions sampled by several processes are those of one engine, follow the policy's weights, and end with them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch

from capipe.models.bundled import folder_of
from capipe.models.engines.base import (
    ChoiceRequest,
    Completion,
    Engine,
    EngineDead,
    GenerationRequest,
    ImageInput,
    Prompt,
    RequestError,
    Sampling,
)
from capipe.models.engines.hf.engine import TransformersEngine, batched_lm, load_model
from capipe.models.engines.model_folder import image_grid
from capipe.models.shared_weights import share
from capipe.trainer.sampling.processes import ModelSource, ProcessEngine

pytestmark = pytest.mark.slow  # each process imports transformers


def prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(count)]
    return [Prompt("Describe the image.", ImageInput(f"{at}", pixels=seen)) for at, seen in enumerate(pixels)]


async def captions(engine: Engine, count: int = 3, tokens: int = 12) -> list[Completion]:
    requests = [
        GenerationRequest(prompt, Sampling(1.0, 1.0, tokens, 10 * at + number), logprobs=True)
        for at, prompt in enumerate(prompts(count))
        for number in range(3)
    ]
    return list(await asyncio.gather(*map(engine.generate, requests)))


class Pair:
    """A model with an engine in this process, and one over two processes that read its weights."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(str(folder), sees=True, dtype="float32", device="cpu")
        grid = image_grid(folder)
        assert grid is not None
        lm = batched_lm(self.model, str(folder), grid)
        self.near = TransformersEngine(lm, grid, 64)
        self.far = ProcessEngine(ModelSource(str(folder), "tiny", grid, share(self.model), None, 64), lm, 2)


@pytest.fixture(scope="module")
async def pair() -> AsyncIterator[Pair]:
    made = Pair(folder_of("captioner"))
    yield made
    await made.near.aclose()
    await made.far.aclose()


async def test_processes_sample_what_one_engine_samples(pair: Pair) -> None:
    near, far = await captions(pair.near), await captions(pair.far)
    assert [each.token_ids for each in near] == [each.token_ids for each in far]
    for one, other in zip(near, far, strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert await captions(pair.far) == far  # to the last bit


async def test_they_see_new_weights_at_once(pair: Pair) -> None:
    before = await captions(pair.far)
    weight = pair.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(0.5)
        near, far = await captions(pair.near), await captions(pair.far)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert [each.token_ids for each in near] == [each.token_ids for each in far] != [each.token_ids for each in before]


async def test_choices_and_errors_come_back(pair: Pair) -> None:
    near, far = [await engine.choose(ChoiceRequest(prompts(1)[0], ("A", "B"))) for engine in (pair.near, pair.far)]
    assert np.allclose(near.logprobs, far.logprobs, atol=1e-4)
    long = Prompt("red " * 5000)
    with pytest.raises(RequestError):
        await pair.far.generate(GenerationRequest(long))
    assert await pair.far.count_tokens(Prompt("red")) == await pair.near.count_tokens(Prompt("red"))


async def test_a_killed_process_ends_the_engine_not_the_run() -> None:
    made = Pair(folder_of("captioner"))
    try:
        os.kill(made.far._workers[1].pid, signal.SIGKILL)
        asked = (made.far.generate(GenerationRequest(prompt)) for prompt in prompts(2))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(outcomes[0], Completion)
        assert isinstance(outcomes[1], EngineDead) and "killed by SIGKILL" in str(outcomes[1])
    finally:
        await made.near.aclose()
        await made.far.aclose()
