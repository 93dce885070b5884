"""Captioners that are no chat models: what is shared and cached must change nothing, transformers' own loop decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from capipe.errors import BadInput
from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, RequestError, Sampling
from capipe.models.engines.captioner_registry import check_prompt
from capipe.models.engines.hf.captioner_adapter import barred_ids, encode_images
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.model_folder import image_grid
from capipe.models.images.decode import ImageLimits, decode_rgb
from capipe.models.images.grid import ImageGrid

from ...conftest import photo
from ..captioners import END, IMAGE, KINDS, PAD, SIDE, START, write_captioner

GRID = ImageGrid(SIDE, SIDE**2, SIDE**2)


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> ImageInput:
    pixels = decode_rgb(photo(seed, size), GRID, ImageLimits())
    assert isinstance(pixels, np.ndarray), pixels
    return ImageInput(f"picture{seed}", pixels)


@pytest_asyncio.fixture(params=KINDS)
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TransformersEngine]:
    folder = write_captioner(tmp_path / request.param, request.param)
    made = await load_engine(EngineConfig("transformers", str(folder), device="cpu"))
    assert isinstance(made, TransformersEngine)
    yield made
    await made.aclose()


def prompted(engine: TransformersEngine) -> bool:
    return type(engine.lm._model).__name__ != "VisionEncoderDecoderModel"


def mixed(engine: TransformersEngine) -> list[GenerationRequest]:
    """Greedy, sampled and cut, of unequal lengths, several captions of three images, with unequal prompts."""
    texts = ("", "a red circle on", "the") if prompted(engine) else ("",)
    requests = []
    for index in range(18):
        sampling = Sampling([0.0, 1.0, 0.7][index % 3], [1.0, 1.0, 0.8][index % 3], 5 + 8 * (index % 5), seed=index)
        prompt = Prompt(texts[index % len(texts)], picture(index % 4))
        requests.append(GenerationRequest(prompt, sampling, logprobs=True))
    return requests


async def test_draws_equal_those_of_transformers(engine: TransformersEngine) -> None:
    requests = mixed(engine)
    fast = await asyncio.gather(*map(engine.generate, requests))
    assert len({each.token_ids for each in fast}) > 9 and len({each.n_tokens for each in fast}) > 3
    assert {each.finish_reason for each in fast} == {"stop", "length"}
    for request, completion in zip(requests, fast, strict=True):
        slow = await engine.generate_reference(request)
        assert completion.token_ids == slow.token_ids
        assert (completion.text, completion.finish_reason) == (slow.text, slow.finish_reason)
        assert completion.logprobs == pytest.approx(slow.logprobs, abs=1e-4)


async def test_the_image_is_what_captions_are_written_from(engine: TransformersEngine) -> None:
    firsts = [GenerationRequest(Prompt("", picture(seed)), Sampling(max_tokens=1), logprobs=True) for seed in range(4)]
    assert len({each.logprobs for each in await asyncio.gather(*map(engine.generate, firsts))}) == 4


async def test_each_image_is_encoded_once_and_attended_to_from_the_cache(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    made: list[tuple[int, ...]] = []
    model: Any = engine.lm._model
    tower = model.vision_model if hasattr(model, "vision_model") else model.encoder
    tower.register_forward_pre_hook(lambda _, __, given: encoded.append(len(given["pixel_values"])), with_kwargs=True)
    of_states = [
        module
        for name, module in engine.lm.family.lm.named_modules()
        if name.endswith(("crossattention.c_attn", "crossattention.self.key", "crossattention.self.value"))
    ]
    for module in of_states:
        module.register_forward_pre_hook(lambda _, given: made.append(tuple(given[0].shape[:2])))
    prompts = [Prompt("", picture(seed)) for seed in range(2)]
    await asyncio.gather(
        *(
            engine.generate(GenerationRequest(each, Sampling(1.0, 1.0, 9, seed)))
            for each in prompts
            for seed in range(4)
        )
    )
    assert sum(encoded) == 2
    assert made == [(2, 5)] * len(of_states)  # once for two images, of four patches and a class token each
    assert bool(of_states) == (type(model).__name__ != "Blip2ForConditionalGeneration")


async def test_what_pads_begins_or_stands_for_pixels_is_never_drawn(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    barred = barred_ids(engine.lm._model)
    assert barred == sorted({PAD, START} | ({IMAGE} if "Blip2" in type(engine.lm._model).__name__ else set()))
    forward = type(engine.lm).forward

    def eager(lm: Any, *arguments: Any, **vision: Any) -> torch.Tensor:
        logits = forward(lm, *arguments, **vision)
        logits[:, barred] = logits.max() + 50
        return logits

    monkeypatch.setattr(type(engine.lm), "forward", eager)
    request = [GenerationRequest(Prompt("", picture(0)), Sampling(1.0, 1.0, 30, seed), True) for seed in range(40)]
    drawn = await asyncio.gather(*map(engine.generate, request))
    tokens = [token for each in drawn for token in each.token_ids]
    assert len(tokens) >= 300 and not set(tokens) & set(barred)
    assert END in tokens


async def test_what_a_captioner_cannot_read_fails_alone(engine: TransformersEngine) -> None:
    good = GenerationRequest(Prompt("", picture(0)), Sampling(max_tokens=4))
    alone = await engine.generate(good)
    wrong = [
        (Prompt("", None), "no image"),
        (Prompt("", picture(0), system="Be short."), "system message"),
        (Prompt("", ImageInput("large", np.zeros((64, 32, 3), np.uint8))), "32 x 64 pixels, and the model looks at"),
    ]
    wrong += [] if prompted(engine) else [(Prompt("a red", picture(0)), "reads no prompt")]
    requests = [GenerationRequest(prompt, Sampling(max_tokens=4)) for prompt, _ in wrong]
    *errors, after = await asyncio.gather(*map(engine.generate, [*requests, good]), return_exceptions=True)
    for error, (_, reason) in zip(errors, wrong, strict=True):
        assert isinstance(error, RequestError) and reason in str(error)
    assert after == alone


async def test_pixels_are_those_of_the_folders_image_processor(engine: TransformersEngine) -> None:
    """The engine's own resizing apart, which every model's pictures go through."""
    from transformers import AutoImageProcessor

    seen = picture(3)
    whole = AutoImageProcessor.from_pretrained(engine.lm._model.name_or_path)(images=[seen.pixels], return_tensors="pt")
    prepared = engine.lm.family.prepare_image(seen)
    assert torch.allclose(prepared.patches, whole["pixel_values"], atol=1e-6)
    features = encode_images(engine.lm._model, [prepared])
    assert features.shape[0] == 1 and features.std() > 0.01


@pytest.mark.parametrize("size", [(32, 32), (3, 90), (90, 3), (640, 31), (21, 400), (1000, 1000)])
def test_pictures_of_any_shape_get_the_one_size(size: tuple[int, int]) -> None:
    pixels = decode_rgb(photo(1, size), GRID, ImageLimits(min_side=1, max_aspect=200))
    assert isinstance(pixels, np.ndarray) and pixels.shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_is_the_image_processors_size(kind: str, tmp_path: Path) -> None:
    folder = write_captioner(tmp_path / kind, kind)
    assert image_grid(folder) == GRID
    with pytest.raises(BadInput, match=r"max_pixels 100: .* looks at 32 x 32 pixels and nothing else"):
        image_grid(folder, max_pixels=100)
    settings = folder / "preprocessor_config.json"
    written = settings.read_text()
    settings.write_text(written.replace('"height": 32', '"height": 48'))
    with pytest.raises(BadInput, match=r"'size' is .* write a square one"):
        image_grid(folder)
    settings.unlink()
    with pytest.raises(BadInput, match="without a preprocessor_config"):
        image_grid(folder)


async def test_folders_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = write_captioner(tmp_path / "blip2", "blip2")
    with pytest.raises(BadInput, match="runs by --engine transformers alone"):
        await load_engine(EngineConfig("vllm", str(folder)))
    settings = folder / "preprocessor_config.json"
    written = settings.read_text()
    settings.write_text(written.replace('"height": 32', '"height": 64').replace('"width": 32', '"width": 64'))
    with pytest.raises(BadInput, match=r"looks at 32 x 32 pixels.*makes 64 x 64"):
        await load_engine(EngineConfig("transformers", str(folder), device="cpu"))
    settings.write_text(written)
    config = folder / "config.json"
    found = config.read_text()
    config.write_text(found.replace('"image_token_index": 3', '"image_token_index": null'))
    with pytest.raises(BadInput, match="has no image_token_index"):
        await load_engine(EngineConfig("transformers", str(folder), device="cpu"))
    config.write_text(found)
    config.write_text(config.read_text().replace("Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"))
    with pytest.raises(BadInput, match=r"Blip2ForImageTextRetrieval writes no captions"):
        image_grid(folder)


def test_prompts_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    blind, prompted = (write_captioner(tmp_path / kind, kind) for kind in ("vit-gpt2", "blip"))
    check_prompt("m", blind, "")
    check_prompt("m", prompted, "a picture of")
    with pytest.raises(BadInput, match="VisionEncoderDecoderModel reads no prompt"):
        check_prompt("m", blind, "a picture of")
    with pytest.raises(BadInput, match="reads no system message"):
        check_prompt("m", prompted, "", system="Be short.")
