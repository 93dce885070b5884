"""VGG features are torchvision's own; what is no feature net is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torchvision.models import vgg

from capipe.errors import BadInput
from capipe.models.scorers.vgg import load_perceptual

from ...small_models import WIDTHS, vgg_net


@torch.inference_mode()
def test_features_are_torchvisions(tmp_path: Path) -> None:
    net = vgg.VGG(vgg.make_layers(list(WIDTHS), batch_norm=False)).eval()
    folder = vgg_net(tmp_path)
    weights = load_file(folder / "model.safetensors")
    net.load_state_dict({**net.state_dict(), **{k: v for k, v in weights.items() if k.startswith("features")}})
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for layer in (None, 3):
        whole = net.features[: layer + 1 if layer is not None else None]((pictures - mean) / std)
        for similarity, theirs in (("cosine", whole.flatten(1)), ("pooled", whole.mean((2, 3)))):
            ours = load_perceptual(str(folder), layer, similarity).vectors(pictures)  # type: ignore[arg-type]
            torch.testing.assert_close(ours, functional.normalize(theirs, dim=-1))


def test_pixels_and_levels_are_the_same_picture(tmp_path: Path) -> None:
    net = load_perceptual(str(vgg_net(tmp_path)))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    levels = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(net.vectors_of_pixels([pixels]), net.vectors(levels))
    flat = torch.full((1, 3, 64, 64), 0.3)  # resized to what the net reads
    torch.testing.assert_close(net.vectors(flat), net.vectors(flat[..., :32, :32]))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"model_type": "resnet"}, r"no feature net \(config.json: model_type"),
        ({"layers": "vgg12"}, r"no feature net \(config.json: layers"),
        ({"layers": [8, "M"]}, "not of the layers in config.json"),
        ({"layers": "vgg16"}, "not of the layers in config.json"),
    ],
)
def test_what_is_no_feature_net_is_refused(tmp_path: Path, written: dict[str, object], said: str) -> None:
    folder = vgg_net(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **written}))
    with pytest.raises(BadInput, match=said) as refused:
        load_perceptual(str(folder))
    assert "\n" not in str(refused.value)


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="features 0 to 7, no layer 8"):
        load_perceptual(str(vgg_net(tmp_path)), 8)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read"):
        load_perceptual(str(tmp_path))
