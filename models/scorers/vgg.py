"""VGG features (Simonyan and Zisserman, 2015), for comparing images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import vgg
from torchvision.transforms.v2.functional import resize

from ...errors import BadInput
from ..engines.model_folder import resolve_model
from ..images.decode import Pixels
from ..images.preprocess import Preprocess
from ..model_json import read_json
from .base import device_and_type

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_TORCHVISION = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
Similarity = Literal["cosine", "pooled"]


class VGGConfig(BaseModel):
    """A feature net's ``config.json``.

    ``layers``: widths of 3 x 3 convolutions (each with a ReLU) and "M", a 2 x 2 max pooling; or a name of
    torchvision's. Weights are beside it, in safetensors, named as in torchvision (``features.``).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["vgg"]
    layers: tuple[int | Literal["M"], ...] | Literal["vgg11", "vgg13", "vgg16", "vgg19"]
    image_size: int = Field(224, ge=8)
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


class PerceptualNet:
    """Feature vectors of images, to be compared by their cosine.

    ``features``: the net up to the chosen layer; ``similarity``: whether :meth:`vectors` hold all features at their
    positions (``cosine``) or their means over positions (``pooled``).
    """

    def __init__(self, features: nn.Module, config: VGGConfig, similarity: Similarity = "cosine") -> None:
        self._features, self._similarity = features.eval(), similarity
        weight = next(features.parameters())
        self.device, self._dtype, self._size = weight.device, weight.dtype, config.image_size
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (config.image_mean, config.image_std)
        )

    def preprocess(self, crop: bool = True) -> Preprocess:
        """The net's preprocessing: the image's centre square, or all of it squashed to a square."""
        return Preprocess(self._size, self._size, "shortest" if crop else "squash")

    @torch.inference_mode()
    def vectors(self, pictures: Tensor) -> Tensor:
        """Unit vectors (n, width), float32, of float images (n, 3, height, width) in [0, 1]; resized as needed."""
        levels = pictures.to(self.device, torch.float32)
        if levels.shape[-2:] != (self._size, self._size):
            levels = resize(levels, [self._size, self._size], antialias=True)
        maps = self._features(((levels - self._mean) / self._std).to(self._dtype)).float()
        return functional.normalize(maps.mean((2, 3)) if self._similarity == "pooled" else maps.flatten(1), dim=-1)

    def vectors_of_pixels(self, pixels: Sequence[Pixels]) -> Tensor:
        """The same for images (height, width, 3) uint8 of one size."""
        return self.vectors(torch.stack([torch.from_numpy(image.copy()) for image in pixels]).permute(0, 3, 1, 2) / 255)


def load_perceptual(
    name: str,
    layer: int | None = None,
    similarity: Similarity = "cosine",
    dtype: str = "auto",
    device: str = "auto",
) -> PerceptualNet:
    """Load ``tiny/vgg`` or a folder with a ``config.json`` (:class:`VGGConfig`) and ``model.safetensors``.

    ``layer``: the index in torchvision's ``features`` after which they are read, the last by default. Raises BadInput
    for a folder that holds no such net.
    """
    folder = resolve_model(name)
    config = _config(folder, name)
    where, number_type = device_and_type(device, dtype)
    net = vgg.make_layers(_layers(config), batch_norm=False)
    _load(net, folder, name)
    last = len(net) - 1 if layer is None else layer
    if not 0 <= last < len(net):
        raise BadInput(f"{name}: has features 0 to {len(net) - 1}, no layer {layer}")
    return PerceptualNet(net[: last + 1].to(where, number_type).requires_grad_(False), config, similarity)


def _config(folder: Path, name: str) -> VGGConfig:
    try:
        return VGGConfig.model_validate(read_json(folder / "config.json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config.json"
        raise BadInput(f"{name}: no feature net (config.json: {key}: {first['msg']}); name a folder of a vgg") from None
    except ValueError as error:
        raise BadInput(f"{name}: config.json is no JSON ({error})") from None


def _layers(config: VGGConfig) -> list[Any]:
    if isinstance(config.layers, str):
        return list(vgg.cfgs[OF_TORCHVISION[config.layers]])
    return list(config.layers)


def _load(net: nn.Module, folder: Path, name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{name}: its model.safetensors cannot be read ({error})") from None
    mark = "features."
    weights = {key.removeprefix(mark): value for key, value in tensors.items() if key.startswith(mark)}
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{name}: model.safetensors is not of the layers in config.json ({reason})") from None
