"""Where weights are and in which type: frozen ones as they are computed with, copies where they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from capipe.models.engines.base import ImageInput, Prompt
from capipe.models.engines.hf.captioner_adapter import image_size
from capipe.models.engines.hf.mixed_precision import frozen_copy
from capipe.trainer import build
from capipe.trainer.build import PolicyParts, build_policy, load_policy, model_weights
from capipe.trainer.distributed import Distributed
from capipe.trainer.policy.batch import Group, pack
from capipe.trainer.recipe import Recipe

from ..policies import completion, random_model

SETTINGS: dict[str, Any] = {"data": {"shards": "", "questions": ""}, "rewards": [{"kind": "length"}]}
WORDS = "Describe the image."
MODELS = ("captioner", "blip2", "vit-gpt2")


def recipe(model: str = "captioner", **settings: Any) -> Recipe:
    return Recipe.model_validate(
        {**SETTINGS, "model": f"tiny/{model}", "dtype": "bfloat16", "prompt": words(model), **settings}
    )


def words(model: str) -> str:
    return WORDS if model == "captioner" else ""


def group_for(parts: PolicyParts, model: str) -> Group:
    side = 56 if model == "captioner" else image_size(parts.policy.model)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    prepared = parts.preparing.prepare(Prompt(words(model), ImageInput("noise", pixels=pixels)))
    return Group("", "", prepared, [completion(9, 1), completion(4, 2)])


def size(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.itemsize for weight in model.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_a_rounded_reference_computes_the_same_bits(model: str) -> None:
    parts = load_policy(recipe(model))
    policy = parts.policy
    halved = frozen_copy(policy.model, torch.bfloat16)
    assert 0.4 < size(halved) / size(policy.model) < 0.8 and size(policy.model) == 4 * sum(
        weight.numel() for weight in policy.model.parameters()
    )
    group = group_for(parts, model)
    banned = policy.get_buffer("banned").tolist()
    with torch.no_grad():
        exact = policy(pack([group])).logp
        rounded = type(policy)(halved, banned, dtype=torch.bfloat16)(pack([group])).logp
    parts.pictures.close()
    assert torch.equal(exact, rounded) and not exact.isnan().any()


def test_in_float32_nothing_is_rounded() -> None:
    parts = build_policy(recipe(dtype="float32", algorithm={"kl": 0.1}))
    assert parts.sampled is parts.policy.model and parts.reference is not None
    assert {weight.dtype for weight in parts.policy.parameters()} == {torch.float32}
    copied = frozen_copy(parts.policy.model, None)
    parts.pictures.close()
    pairs = zip(parts.policy.model.parameters(), copied.parameters(), strict=True)
    assert all(torch.equal(*pair) and pair[0].data_ptr() != pair[1].data_ptr() for pair in pairs)


def test_what_learns_stays_in_float32_and_is_written_in_the_computing_type() -> None:
    parts = build_policy(recipe(algorithm={"kl": 0.1}))
    parts.pictures.close()
    types = {(weight.requires_grad, weight.dtype) for weight in parts.policy.model.parameters() if weight.ndim > 1}
    assert (True, torch.float32) in types and (True, torch.bfloat16) not in types and (False, torch.bfloat16) in types
    written = model_weights(parts)
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert written.keys() == parts.policy.model.state_dict().keys()


@pytest.mark.parametrize(
    ("engine", "rank", "sharded", "overlap"),
    [
        ("vllm", 0, True, False),
        ("vllm", 1, True, False),
        ("http://127.0.0.1:1", 0, True, True),
        ("vllm", 1, False, False),
        ("transformers", 1, True, False),
        ("transformers", 0, False, True),
        ("transformers", 0, False, False),
    ],
)
def test_the_samplers_copy_is_where_it_is_needed(engine: str, rank: int, sharded: bool, overlap: bool) -> None:
    settings = recipe(rollout={"engine": engine, "overlap": overlap})
    parts = load_policy(settings, distributed=Distributed(rank, 2, sharded))
    parts.pictures.close()
    sampled, own = build._sampled(settings, parts), engine == "transformers"
    if not sharded and not (own and overlap):
        assert sampled is parts.policy.model
    elif rank and not own:
        assert sampled is None
    else:
        types = {weight.dtype for weight in sampled.parameters()}
        assert types == ({torch.float32, torch.bfloat16} if own else {torch.bfloat16})
        assert not any(weight.requires_grad for weight in sampled.parameters())
        assert all(buffer.dtype != torch.bfloat16 for buffer in sampled.buffers())


def test_a_tied_head_stays_tied_in_a_copy() -> None:
    model = random_model("qwen2.5")
    model.lm_head.weight = model.get_input_embeddings().weight
    copied = frozen_copy(model, torch.bfloat16)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight
    assert copied.lm_head.weight.dtype == torch.float64  # looked up as well, so not rounded
    assert frozen_copy(model, torch.bfloat16, entirely=True).lm_head.weight.dtype == torch.bfloat16


def test_the_allocators_cache_is_emptied_once_all_is_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache"))
    monkeypatch.setattr(build.gc, "collect", lambda: emptied.append("garbage"))
    parts = build_policy(recipe())
    assert emptied == ["garbage"]  # there is no such cache on a CPU
    monkeypatch.setattr(type(parts.policy), "device", torch.device("cuda"))
    build.empty_cache(parts.policy.device)
    parts.pictures.close()
    assert emptied == ["garbage", "garbage", "cache"]
