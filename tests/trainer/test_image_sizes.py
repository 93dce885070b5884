"""A recipe's max_pixels is what all of a run looks at, and what its memory was worked out for is held against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import ImageInput, Prompt
from capipe.models.engines.context import image_tokens, text_room
from capipe.models.engines.model_folder import image_grid, resolve_model
from capipe.models.images.decode import ImageLimits, decode_rgb
from capipe.models.images.grid import ImageGrid
from capipe.models.tiny.world.corpus import samples
from capipe.trainer.build import build_policy, refuse_large_images
from capipe.trainer.recipe import Recipe, load_recipe
from capipe.trainer.sampling import sampler

MODEL = "tiny/captioner"
QWEN = ImageGrid(28, 3136, 12845056)  # Qwen2.5-VL's own limits
PRODUCTION = ("caprl-paper", "caprl-released")


def recipe(**more: Any) -> Recipe:
    plain = {"model": MODEL, "data": {"shards": "", "questions": ""}, "rewards": [{"kind": "length"}]}
    return Recipe.model_validate({**plain, **more})


def test_runs_without_the_key_are_what_they_were() -> None:
    plain = recipe().semantic()
    assert {"max_pixels", "min_pixels"}.isdisjoint(plain)
    assert recipe(max_pixels=6272).semantic() == {**plain, "max_pixels": 6272}
    assert recipe(min_pixels=3136).semantic() == {**plain, "min_pixels": 3136}


@pytest.mark.parametrize("name", PRODUCTION)
def test_production_recipes_keep_to_the_memory_that_they_work_out(name: str) -> None:
    made = load_recipe(Path(name))
    assert made.max_pixels is not None
    tokens = image_tokens(ImageGrid(28, 3136, made.max_pixels))
    assert tokens + len(made.prompt.encode()) + 40 <= 1500  # of the recipe's arithmetic: image, prompt, template
    refuse_large_images(made, ImageGrid(28, 3136, made.max_pixels))


def test_images_that_memory_was_not_worked_out_for_are_refused_with_the_number() -> None:
    made = load_recipe(Path("caprl-released"))
    with pytest.raises(BadInput) as caught:
        refuse_large_images(made, QWEN)
    prompt = text_room([made.prompt], 0)
    room = 16384 - prompt - 4096
    assert str(caught.value) == (
        f"max_pixels: an image of 12845056 pixels is 16384 tokens; with up to {prompt} of the prompt and 4096 of a "
        f"caption that is {16384 + prompt + 4096}, more than budget (16384): set max_pixels to {room * 784} or less, "
        "or raise budget"
    )
    refuse_large_images(made, ImageGrid(28, 3136, room * 784))
    with pytest.raises(BadInput, match="max_pixels"):
        refuse_large_images(made, ImageGrid(28, 3136, (room + 1) * 784))
    with pytest.raises(BadInput, match=r"lower rollout\.max_tokens"):
        refuse_large_images(made.model_copy(update={"budget": 4096}), ImageGrid(28, 784, 784))


def test_the_whole_run_looks_at_such_images(monkeypatch: pytest.MonkeyPatch) -> None:
    own = image_grid(resolve_model(MODEL))
    assert own is not None
    limit = own.max_pixels // 4
    parts = build_policy(recipe(max_pixels=limit, rollout={"engine": "vllm", "max_tokens": 50}))
    assert parts.grid == ImageGrid(own.factor, own.min_pixels, limit)
    encoded = next(iter(samples(1, "heldout", seed=1))).image
    pixels = decode_rgb(encoded, parts.grid, ImageLimits())
    prepared = parts.preparing.prepare(Prompt("Describe.", ImageInput("0" * 32, pixels)))  # type: ignore[arg-type]
    assert 0 < int((prepared.ids == parts.sampled.config.image_token_id).sum()) <= limit // own.factor**2
    started: list[Any] = []
    monkeypatch.setattr(sampler, "vllm_runs", lambda: True)
    monkeypatch.setattr(sampler, "start_vllm_engine", started.append)
    sampler._vllm(recipe(max_pixels=limit, rollout={"engine": "vllm", "max_tokens": 50}), parts)
    assert started[0].grid == parts.grid
    assert started[0].max_model_len == image_tokens(parts.grid) + text_room([recipe().prompt], 50)
    parts.pictures.close()


def test_limits_that_no_image_lies_within() -> None:
    with pytest.raises(BadInput, match="min_pixels 9000 is above max_pixels 8000"):
        build_policy(recipe(max_pixels=8000, min_pixels=9000))
