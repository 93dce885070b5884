"""Reconstruction reward: similarity of the image and images generated from its caption (Luo, Song and Ma, UVA report).

They generate five images with Stable Diffusion and compare VGG features. Its version, the layer, the resolution,
guidance and the similarity are not stated there; here they are settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ...errors import BadInput
from ...manifests.files.storage import write_new
from ...models.diffusion import Painter, load_painter, need_diffusers, pipeline_folder
from ...models.dynamic_batcher import DynamicBatcher, most_on
from ...models.engines.base import Completion
from ...models.engines.model_folder import folder_digest, resolve_model
from ...models.images.decode import Pixels
from ...models.lru_cache import LRUCache
from ...models.scorers.vgg import PerceptualNet, load_perceptual
from ..dataset import Example
from .base import RewardConfig, RewardSpec, Scored
from .image_cache import KEPT, ImageCache

CAPTIONS_KEPT = 1024
OfImage = tuple[str, str]  # an image's uid and a caption
MOST = 32  # captions per batch; results are returned after each batch


class ReconstructionConfig(RewardConfig):
    kind: Literal["reconstruction"] = "reconstruction"
    model: str = Field(description="a diffusers text-to-image pipeline: bundled, a folder, a hub id")
    features: str = Field(description="who compares: a VGG net, bundled or a folder (models/scorers/vgg.py)")
    samples: int = Field(5, ge=1, description="images per caption")
    steps: int = Field(20, ge=1, description="denoising steps per image")
    guidance: float = Field(7.5, ge=0, description="how much the text counts; 1 is without guidance")
    size: int | None = Field(
        None, ge=8, description="height and width of the generated images; the pipeline's own by default"
    )
    layer: int | None = Field(None, ge=0, description="index in the net's features after which they are read; the last")
    similarity: Literal["cosine", "pooled"] = Field(
        "cosine", description="of all features where they are, or of their means over places"
    )
    crop: bool = Field(True, description="compare with the image's middle square; false: with all of it made square")
    batch: int = Field(8, ge=1, description="images generated at once")
    cache: str | None = Field(None, description="folder that keeps features of generated images, for later runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")


@dataclass(frozen=True)
class _Asked:
    uid: str
    pixels: Pixels
    caption: str


def seed_of(uid: str, number: int) -> int:
    """Seed (63 bits) of the ``number``-th image that is generated from any caption of image ``uid``.

    Captions of one image start from the same noise (common random numbers): their differences vary less.
    """
    return int.from_bytes(hashlib.sha256(f"{uid}:{number}".encode()).digest()[:8], "big") >> 1


def _hash(caption: OfImage) -> str:
    return hashlib.sha256("\0".join(caption).encode()).hexdigest()


class ReconstructionReward:
    """Mean similarity of ``samples`` generated images; ``details``: each similarity and the mean's standard error.

    Feature vectors of generated images are cached by the image's uid and the caption's hash. ``identity``: text of all
    settings that determine these vectors, for cache files that outlive the run.
    """

    metrics = ("se",)

    def __init__(self, painter: Painter, net: PerceptualNet, config: ReconstructionConfig, identity: str = "") -> None:
        self._painter, self._net, self._config, self._identity = painter, net, config, identity
        self._views = ImageCache(net.preprocess(config.crop))
        self._drawn: LRUCache[str, Tensor] = LRUCache(CAPTIONS_KEPT)
        self._originals: LRUCache[str, Tensor] = LRUCache(KEPT)
        self._model: DynamicBatcher[_Asked, list[float]] = DynamicBatcher(
            self._similarities, min(MOST, most_on(net.device))
        )

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        text = caption.text.strip()
        similarities = await self._model.ask(_Asked(example.uid, await self._views.of(example), text))
        if not all(map(math.isfinite, similarities)):
            return Scored(None, {"error": "a similarity is no number"})
        mean, error = mean_and_error(similarities)
        return Scored(mean, {"similarities": similarities, "se": error})

    def _similarities(self, asked: Sequence[_Asked]) -> list[list[float]]:
        """Similarities of each caption's generated images with its image. Runs on the batcher's thread."""
        originals = self._vectors_of_images({request.uid: request.pixels for request in asked})
        drawn = self._vectors_of_captions(list(dict.fromkeys((request.uid, request.caption) for request in asked)))
        return [(drawn[request.uid, request.caption] @ originals[request.uid]).tolist() for request in asked]

    def _vectors_of_images(self, pixels: dict[str, Pixels]) -> dict[str, Tensor]:
        known = {uid: cached for uid in pixels if (cached := self._originals.get(uid)) is not None}
        new = [uid for uid in pixels if uid not in known]
        if new:
            vectors = self._net.vectors_of_pixels([pixels[uid] for uid in new]).cpu()
            known |= zip(new, vectors, strict=True)
        for uid in new:
            self._originals.put(uid, known[uid])
        return known

    def _vectors_of_captions(self, captions: Sequence[OfImage]) -> dict[OfImage, Tensor]:
        """Feature vectors (samples, width) of each caption's generated images; uncached ones are generated."""
        known = {caption: kept for caption in captions if (kept := self._kept(caption)) is not None}
        new = [caption for caption in captions if caption not in known]
        count = self._config.samples
        wanted = [(text, seed_of(uid, number)) for uid, text in new for number in range(count)]
        if wanted:
            vectors = self._net.vectors(self._painter.paint(wanted)).cpu()
            known |= zip(new, vectors.split(count), strict=True)
        for caption in new:
            self._keep(caption, known[caption])
        return known

    def _kept(self, caption: OfImage) -> Tensor | None:
        key = _hash(caption)
        vectors = self._drawn.get(key)
        if vectors is None and (file := self._file(caption)) is not None and file.is_file():
            try:
                vectors = torch.from_numpy(np.load(file, allow_pickle=False))
            except (OSError, ValueError):  # truncated, e.g. by a full disk: generated again
                return None
            self._drawn.put(key, vectors)
        return vectors

    def _keep(self, caption: OfImage, vectors: Tensor) -> None:
        self._drawn.put(_hash(caption), vectors)
        if (file := self._file(caption)) is not None:
            data = io.BytesIO()
            np.save(data, vectors.numpy())
            write_new(file, data.getvalue())

    def _file(self, caption: OfImage) -> Path | None:
        if self._config.cache is None:
            return None
        name = hashlib.sha256(f"{self._identity}:{_hash(caption)}".encode()).hexdigest()
        return Path(self._config.cache).expanduser() / name[:2] / f"{name}.npy"

    async def aclose(self) -> None:
        self._views.close()
        await self._model.aclose()


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its Monte Carlo standard error, sqrt(variance / n), which is None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def build_reconstruction_reward(config: ReconstructionConfig) -> ReconstructionReward:
    """The reward with its models loaded. Raises BadInput for a missing model, or if diffusers is not installed."""
    need_diffusers()
    if config.cache is not None and Path(config.cache).expanduser().is_file():
        raise BadInput(f"rewards: reconstruction: cache: {config.cache} is a file, not a folder")
    net = load_perceptual(config.features, config.layer, config.similarity, config.dtype, config.device)
    painter = load_painter(
        config.model,
        steps=config.steps,
        guidance=config.guidance,
        size=config.size,
        batch=config.batch,
        dtype=config.dtype,
        device=config.device,
    )
    return ReconstructionReward(painter, net, config, _identity(config) if config.cache is not None else "")


def _identity(config: ReconstructionConfig) -> str:
    """Settings that determine the vectors of a caption's generated images, as text."""
    speed = {"kind", "model", "features", "crop", "batch", "cache", "device", "weight", "normalise"}
    models = [folder_digest(pipeline_folder(config.model)), folder_digest(resolve_model(config.features))]
    return json.dumps([models, config.model_dump(mode="json", exclude=speed)], sort_keys=True)


SPEC = RewardSpec(ReconstructionConfig, lambda config, context: build_reconstruction_reward(config), of_image=True)
