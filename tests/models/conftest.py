"""The bundled captioner in both in-process engines, and held-out pictures for it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import pytest_asyncio
import torch

from capipe.models.engines.base import Completion, Engine, EngineDead, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.vllm.engine import VLLMEngine
from capipe.models.images.decode import ImageLimits, decode_rgb
from capipe.models.images.grid import ImageGrid
from capipe.models.tiny.world.corpus import samples

MODEL = "tiny/captioner"
ROOM = 512  # tokens; enough for every prompt here, and a limit that a test can exceed
GRID = ImageGrid(28, 56 * 56, 112 * 112)
PLAIN, DETAILED = "Describe the image.", "Describe the image in detail."


def picture(encoded: bytes) -> ImageInput:
    """A file as a stage would hand it to any engine: pixels on the grid and the bytes themselves."""
    pixels = decode_rgb(encoded, GRID, ImageLimits())
    assert isinstance(pixels, np.ndarray), pixels
    return ImageInput(hashlib.sha256(encoded).hexdigest()[:32], pixels, encoded)


@pytest.fixture(scope="session")
def pictures() -> list[ImageInput]:
    """Forty scenes that the captioner never saw in training."""
    return [picture(each.image) for each in samples(40, "heldout", seed=11)]


def many(pictures: list[ImageInput]) -> list[GenerationRequest]:
    """Far more than four sequences at a time can finish while the test looks away."""
    return [
        GenerationRequest(Prompt(DETAILED, image), Sampling(1.0, seed=seed)) for seed in range(8) for image in pictures
    ]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster without a second thread, by far so when another process wants that core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def reference() -> AsyncIterator[TransformersEngine]:
    engine = await load_engine(EngineConfig("transformers", MODEL, device="cpu", max_model_len=ROOM))
    assert isinstance(engine, TransformersEngine)
    yield engine
    await engine.aclose()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(pictures: list[ImageInput]) -> AsyncIterator[Engine]:
    """One for all tests, as it takes its time to start; that closing it is clean is checked when it goes."""
    pytest.importorskip("vllm")
    cores = os.sched_getaffinity(0)
    engine = await load_engine(EngineConfig("vllm", MODEL, max_model_len=ROOM, concurrency=32))
    assert isinstance(engine, VLLMEngine)
    processes = list(engine._processes)
    assert processes
    taken = set[int]().union(*(each.cpu_affinity() for each in processes if each.name() == "VLLM::Worker"))
    assert len(cores) == 1 or (taken and not taken & os.sched_getaffinity(0))
    yield engine
    tasks = [asyncio.create_task(engine.generate(each)) for each in many(pictures)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await engine.aclose()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert {type(each) for each in outcomes} == {EngineDead, Completion}
    assert not any(each.is_running() for each in processes)
    assert os.sched_getaffinity(0) == cores
    with pytest.raises(EngineDead):
        await engine.generate(many(pictures)[0])
