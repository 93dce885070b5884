"""A tower that multiplies patches and batches its windows sees what transformers' own sees, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from capipe.models.engines.hf import window_attention as windows
from capipe.models.engines.hf.patch_embedding import multiply_patches
from capipe.models.engines.hf.window_attention import batch_windows

from ...trainer.policies import image, random_model

SIZES = {"alike": [(1, 4, 8), (1, 4, 8)], "unlike": [(1, 4, 4), (1, 4, 8), (1, 6, 10)]}


def seen(family: str, sizes: list[tuple[int, int, int]], fast: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    model = random_model(family)
    visual = model.model.visual
    if fast:
        multiply_patches(visual)
        batch_windows(visual)
    images = [image(family, size, number) for number, size in enumerate(sizes)]
    patches, grids = torch.cat([each.patches for each in images]), torch.cat([each.grid for each in images])
    out = torch.cat(model.model.get_image_features(patches, grids, return_dict=True).pooler_output)
    out.square().sum().backward()
    return out.detach(), {name: weight.grad for name, weight in visual.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_a_fast_tower_equals_transformers_own(
    family: str, sizes: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    attend = windows._attend

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[3])
        return attend(*arguments)

    monkeypatch.setattr(windows, "_attend", counted)
    (slow, expected), (fast, found) = (seen(family, sizes, each) for each in (False, True))
    assert calls and len(calls) <= 3 * len(set(sizes))  # per layer one call for each length of windows
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    assert found.keys() == expected.keys() and "patch_embed.proj.weight" in found
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


def test_other_towers_are_left_alone() -> None:
    tower = torch.nn.Linear(2, 2)
    multiply_patches(tower)
    batch_windows(tower)
    multiply_patches(None)
    batch_windows(None)
    assert "forward" not in vars(tower)
