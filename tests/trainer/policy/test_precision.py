"""Computing in bfloat16 with float32 weights: what it may change, what not, and that sampler and trainer agree."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.hf.mixed_precision import frozen_copy
from capipe.trainer.build import build_policy, computed_in
from capipe.trainer.policy.batch import Batch, Group, pack
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.recipe import Recipe
from capipe.trainer.sampling.logprobs import sampling_gaps
from capipe.trainer.sampling.sampler import build_sampler

from ..policies import IMAGE, groups, random_model
from .test_decoder import gradients

FAMILIES = ("qwen2.5", "qwen3")


def packed_groups(policy: DecoderPolicy, family: str) -> Batch:
    made = groups(policy, family)
    for group in made:
        if group.prompt.image is not None:
            object.__setattr__(group.prompt.image, "patches", group.prompt.image.patches.float())
    return pack(made)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_float32_but_for_rounding(family: str, checkpointing: bool) -> None:
    model = random_model(family).float()
    policies = [DecoderPolicy(model, [IMAGE], dtype=dtype) for dtype in (None, torch.bfloat16)]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = packed_groups(policies[0], family)
    found = []
    for policy in policies:
        policy.zero_grad()
        scores = policy(batch)
        assert scores.logp.dtype == scores.entropy.dtype == torch.float32
        (scores.logp * torch.linspace(-1, 1, len(scores.logp))).sum().backward()
        found.append((scores.logp.detach(), gradients(policy)))
    (exact, expected), (rounded, gradient) = found
    assert 0 < (rounded - exact).abs().mean() < 0.05
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99
    assert gradient.dtype == torch.float32 and {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_kept_in_bfloat16_computes_the_same_bits(family: str) -> None:
    model = random_model(family).float()
    batch = packed_groups(DecoderPolicy(model, [IMAGE]), family)
    halved = frozen_copy(model, torch.bfloat16)
    assert {weight.dtype for weight in halved.parameters()} == {torch.float32, torch.bfloat16}
    with torch.no_grad():
        exact, same = (DecoderPolicy(each, [IMAGE], dtype=torch.bfloat16)(batch).logp for each in (model, halved))
    assert torch.equal(exact, same) and exact.isfinite().all()


def test_auto_is_what_the_device_is_good_at() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert computed_in("auto", cpu) is None and computed_in("auto", cuda) is torch.bfloat16
    assert computed_in("bfloat16", cpu) is torch.bfloat16 and computed_in("float32", cuda) is None


async def test_captions_are_drawn_in_the_precision_that_they_are_trained_in(tmp_path: Path) -> None:
    settings = {"model": "tiny/captioner", "data": {"shards": "", "questions": ""}, "rewards": [{"kind": "length"}]}
    recipe = Recipe.model_validate({**settings, "dtype": "bfloat16"})
    parts = build_policy(recipe)
    assert {weight.dtype for weight in parts.policy.parameters() if weight.requires_grad} == {torch.float32}
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    prompt = Prompt("Describe the image.", ImageInput("noise", pixels=pixels))
    sampler = await build_sampler(recipe, parts, tmp_path, prompt)
    assert isinstance(sampler.engine, TransformersEngine)

    async def apart() -> float:
        sampling = [Sampling(1.0, 1.0, 40, seed) for seed in range(8)]
        requests = [GenerationRequest(prompt, each, logprobs=True) for each in sampling]
        captions = await asyncio.gather(*map(sampler.engine.generate, requests))
        group = Group("", "", parts.preparing.prepare(prompt), list(captions))
        with torch.no_grad():
            gaps = sampling_gaps([group], parts.policy(pack([group])).logp)
        assert len(gaps) == group.tokens() > 40
        return float(gaps.mean())

    try:
        alike = await apart()
        sampler.engine.lm.computes_in = None
        parts.policy.model.float()  # frozen matrices, which are kept in bfloat16
        otherwise = await apart()
    finally:
        parts.pictures.close()
        await sampler.aclose()
    # Half precision rounds each part of a tree's attention, so that alike is not equal.
    assert alike < 0.001 and alike < 0.7 * otherwise
