"""Image-text similarity rewards: cosine of CLIP and BLIP, matching logit of BLIP.

VLRM (arXiv 2404.01911) uses BLIP-2's positive matching logit before softmax, Luo, Song and Ma BLIP's cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...models.dynamic_batcher import MOST, DynamicBatcher, most_on
from ...models.engines.base import Completion
from ...models.images.decode import Pixels
from ...models.lru_cache import LRUCache
from ...models.scorers.base import Pair, Scorer, device_and_type
from ...models.scorers.blip_contrastive import load_blip
from ...models.scorers.clip import load_clip
from ...models.scorers.itm import ItmScorer, load_itm
from ...models.scorers.sentences import split_sentences
from ..dataset import Example
from .base import RewardConfig, RewardSpec, Scored
from .image_cache import KEPT, ImageCache

IMAGES_AT_ONCE = 32  # batch size of the vision encoder
Values = Callable[[Tensor, Sequence[Pair]], list[float]]


class _ImageTextConfig(RewardConfig):
    by: Literal["whole", "sentences_mean", "sentences_min"] = Field(
        "whole", description="what is scored: as much of the caption as the model reads, or each sentence by itself"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")


class ClipRewardConfig(_ImageTextConfig):
    """The cosine, in [-1, 1]."""

    kind: Literal["clip"] = "clip"
    model: str = Field(description="tiny/clip, a folder, ARCHITECTURE:PRETRAINED of open_clip, a hub id")


class BlipRewardConfig(_ImageTextConfig):
    """The cosine of the contrastive heads, in [-1, 1]."""

    kind: Literal["blip"] = "blip"
    model: str = Field(description="a BLIP retrieval model: bundled, a folder, a hub id")


class ItmRewardConfig(_ImageTextConfig):
    """What the matching head says; a logit has no bounds."""

    kind: Literal["itm"] = "itm"
    model: str = Field(description="a BLIP or BLIP-2 retrieval model: bundled, a folder, a hub id")
    logit: Literal["positive", "difference", "probability"] = Field(
        "positive",
        description="positive: the logit of a match before softmax, as VLRM; difference: minus that of no match; "
        "probability: of a match",
    )


ImageTextConfig = ClipRewardConfig | BlipRewardConfig | ItmRewardConfig


@dataclass(frozen=True)
class _Request:
    uid: str
    pixels: Pixels
    texts: tuple[str, ...]


class ImageTextReward:
    """Reward of an image-text model. ``values``: scores pairs of encoded image and text; ``most``: batch size."""

    def __init__(self, scorer: Scorer, values: Values, by: str = "whole", most: int = MOST) -> None:
        self._scorer, self._values, self._by = scorer, values, by
        self._views = ImageCache(scorer.preprocess)
        self._encoded: LRUCache[str, Tensor] = LRUCache(KEPT)
        self._model: DynamicBatcher[_Request, list[float]] = DynamicBatcher(self._scores, most)

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        texts = [caption.text] if self._by == "whole" else split_sentences(caption.text) or [caption.text]
        scores = await self._model.ask(_Request(example.uid, await self._views.of(example), tuple(texts)))
        value = min(scores) if self._by == "sentences_min" else sum(scores) / len(scores)
        if not all(map(math.isfinite, scores)):
            return Scored(None, {"error": "the model's score is no number"})
        return Scored(value, {} if self._by == "whole" else {"sentences": scores})

    def _scores(self, requests: Sequence[_Request]) -> list[list[float]]:
        """Scores of each text of each caption. Runs on the batcher's thread."""
        images = self._images({request.uid: request.pixels for request in requests})
        numbers = {uid: number for number, uid in enumerate(images)}
        wanted = [[Pair(numbers[request.uid], text) for text in request.texts] for request in requests]
        pairs = list(dict.fromkeys(pair for of_one in wanted for pair in of_one))
        scores = dict(zip(pairs, self._values(torch.stack(list(images.values())), pairs), strict=True))
        return [[scores[pair] for pair in of_one] for of_one in wanted]

    def _images(self, pixels: dict[str, Pixels]) -> dict[str, Tensor]:
        """Encoded images by uid; only uncached ones are computed."""
        known = {uid: cached for uid in pixels if (cached := self._encoded.get(uid)) is not None}
        new = [uid for uid in pixels if uid not in known]
        for start in range(0, len(new), IMAGES_AT_ONCE):
            batch = new[start : start + IMAGES_AT_ONCE]
            known |= zip(batch, self._scorer.encode_images([pixels[uid] for uid in batch]).unbind(), strict=True)
        for uid in new:
            self._encoded.put(uid, known[uid])
        return {uid: known[uid] for uid in pixels}

    async def aclose(self) -> None:
        self._views.close()
        await self._model.aclose()


def build_image_text_reward(config: ImageTextConfig) -> ImageTextReward:
    """The reward with its model loaded. Raises BadInput for a missing model, or one of another kind."""
    named = (config.model, config.dtype, config.device)
    most = most_on(device_and_type(config.device, config.dtype)[0])
    if isinstance(config, ItmRewardConfig):
        itm = load_itm(*named)
        return ImageTextReward(itm, itm_values(itm, config.logit), config.by, most)
    scorer: Scorer = load_clip(*named) if isinstance(config, ClipRewardConfig) else load_blip(*named)
    return ImageTextReward(scorer, scorer.score, config.by, most)


def itm_values(scorer: ItmScorer, logit: str) -> Values:
    """Function that computes :attr:`ItmRewardConfig.logit` of pairs."""

    def values(images: Tensor, pairs: Sequence[Pair]) -> list[float]:
        logits = scorer.logits(images, pairs)
        of_kind = {
            "positive": logits[:, 1],
            "difference": logits[:, 1] - logits[:, 0],
            "probability": logits.softmax(-1)[:, 1],
        }
        scores: list[float] = of_kind[logit].tolist()
        return scores

    return values


CLIP, BLIP, ITM = (
    RewardSpec(config, lambda config, context: build_image_text_reward(config), of_image=True)
    for config in (ClipRewardConfig, BlipRewardConfig, ItmRewardConfig)
)
