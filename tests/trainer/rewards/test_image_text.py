"""CLIP, BLIP and matching as rewards: the scorers' own values, each image encoded once, whoever shares the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capipe.errors import BadInput
from capipe.models.engines.base import Completion
from capipe.models.images.decode import ImageLimits, Pixels
from capipe.models.images.formats import ImageProblem
from capipe.models.images.preprocess import Preprocess, decode_preprocessed
from capipe.models.scorers.base import Pair
from capipe.models.scorers.sentences import split_sentences
from capipe.models.tiny.world.corpus import samples
from capipe.trainer.dataset import Example
from capipe.trainer.rewards.image_text import (
    BlipRewardConfig,
    ClipRewardConfig,
    ImageTextReward,
    ItmRewardConfig,
    build_image_text_reward,
)

from ...small_models import blip_retrieval
from .test_judge import examples, jpeg

TEXTS = ("A red star.", "Two shapes on a white background. A large red star is in the center.", "word " * 90, "")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [sample.image for sample in samples(3, "heldout", seed=5)]


@pytest.fixture
def shown(tmp_path: Path, images: list[bytes]) -> list[Example]:
    return examples(tmp_path / "a.tar", **{f"image{number}": image for number, image in enumerate(images)})


def caption(text: str) -> Completion:
    return Completion(text, (1, 2), "stop", 2)


def config(kind: str, folder: Path, **settings: Any) -> Any:
    if kind == "clip":
        return ClipRewardConfig(model="tiny/clip", **settings)
    if kind == "blip":
        return BlipRewardConfig(model=str(blip_retrieval(folder)), **settings)
    return ItmRewardConfig(model="tiny/itm", **settings)


async def values(reward: ImageTextReward, asked: Sequence[tuple[Example, str]]) -> list[float]:
    scored = await asyncio.gather(*(reward.score(example, caption(text), "d") for example, text in asked))
    return [float(each.value) for each in scored if each.value is not None]


@pytest.mark.parametrize("kind", ["clip", "blip", "itm"])
async def test_a_reward_is_the_scorers_value_alone_and_together(
    kind: str, tmp_path: Path, images: list[bytes], shown: list[Example]
) -> None:
    made = config(kind, tmp_path / "blip")
    reward = build_image_text_reward(made)  # one by one on a CPU
    batched = ImageTextReward(reward._scorer, reward._values)
    try:
        asked = [(example, text) for example in shown for text in TEXTS]
        together = await values(batched, asked)
        assert len(together) == len(asked) and len(set(together)) > 6
        for each, value in zip(asked[::3], together[::3], strict=True):
            assert await values(reward, [each]) == pytest.approx([value], abs=1e-4)
        scorer: Any = reward._scorer
        views = [
            decode_preprocessed(image, preprocesses=(scorer.preprocess,), limits=ImageLimits()) for image in images
        ]
        encoded = scorer.encode_images([view[0] for view in views if not isinstance(view, ImageProblem)])
        pairs = [Pair(number, text) for number in range(3) for text in TEXTS]
        own = scorer.logits(encoded, pairs)[:, 1].tolist() if kind == "itm" else scorer.score(encoded, pairs)
        assert together == pytest.approx(own, abs=1e-4)
    finally:
        await reward.aclose()
        await batched.aclose()


async def test_matching_tells_a_logit_a_difference_or_a_probability(shown: list[Example]) -> None:
    asked = [(example, text) for example in shown for text in TEXTS[:2]]
    told: dict[str, Tensor] = {}
    for logit in ("positive", "difference", "probability"):
        reward = build_image_text_reward(ItmRewardConfig(model="tiny/itm", logit=logit))  # type: ignore[arg-type]
        told[logit] = torch.tensor(await values(reward, asked))
        await reward.aclose()
    torch.testing.assert_close(told["difference"].sigmoid(), told["probability"], atol=1e-5, rtol=0)
    assert not torch.allclose(told["positive"], told["difference"], atol=1e-2)
    assert ItmRewardConfig(model="m").logit == "positive"


async def test_captions_by_sentence(shown: list[Example]) -> None:
    text = TEXTS[1]
    whole, *parts = [(shown[0], each) for each in (text, *split_sentences(text))]
    reward = build_image_text_reward(ClipRewardConfig(model="tiny/clip"))
    alone = await values(reward, [whole, *parts])
    await reward.aclose()
    for by, expected in (("sentences_mean", sum(alone[1:]) / 2), ("sentences_min", min(alone[1:]))):
        reward = build_image_text_reward(ClipRewardConfig(model="tiny/clip", by=by))  # type: ignore[arg-type]
        scored = await reward.score(shown[0], caption(text), "d")
        assert scored.value == pytest.approx(expected, abs=1e-5)
        assert scored.details["sentences"] == pytest.approx(alone[1:], abs=1e-5)
        assert (await reward.score(shown[0], caption(""), "d")).value is not None  # without a sentence: the whole
        await reward.aclose()


class Counting:
    """A scorer that remembers what it encoded; a text is worth its length, "nan" is worth no number."""

    name = "counting"
    preprocess = Preprocess(8, 8)

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self.scored: list[int] = []

    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        self.encoded.append(len(pixels))
        return torch.tensor([[float(each.mean())] for each in pixels])

    def tokenize(self, texts: Sequence[str]) -> Any:
        raise NotImplementedError

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Any = None) -> list[float]:
        self.scored.append(len(pairs))
        return [float("nan") if pair.text == "nan" else float(len(pair.text)) for pair in pairs]


@pytest.fixture
def counting() -> Iterator[Counting]:
    yield Counting()


async def test_an_image_is_read_and_encoded_once_and_captions_that_end_together_share_a_batch(
    counting: Counting, shown: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = Example.read
    monkeypatch.setattr(Example, "read", lambda self: read.append(self.key) or whole(self))  # type: ignore[func-returns-value]
    reward = ImageTextReward(counting, counting.score)
    await values(reward, [(example, f"caption {n}") for example in shown for n in range(4)])
    asked = [(example, text) for example in shown for text in ("one", "other", "one")]
    assert await values(reward, asked) == [3, 5, 3] * 3
    assert sorted(read) == ["image0", "image1", "image2"] and sum(counting.encoded) == 3
    assert counting.scored[-1] == 6  # of nine captions the six that differ
    await reward.aclose()


async def test_what_is_no_number_is_unscored_and_said(counting: Counting, shown: list[Example]) -> None:
    reward = ImageTextReward(counting, counting.score)
    found = await asyncio.gather(*(reward.score(shown[0], caption(text), "d") for text in ("nan", "good")))
    assert found[0].value is None and "no number" in found[0].details["error"]
    assert found[1].value == 4
    await reward.aclose()


async def test_an_image_that_breaks_is_tried_again_for_the_next_caption(counting: Counting, tmp_path: Path) -> None:
    (example,) = examples(tmp_path / "a.tar", one=jpeg("red")[:200])
    reward = ImageTextReward(counting, counting.score)
    for _ in range(2):
        with pytest.raises(Exception, match="'one' cannot be decoded"):
            await reward.score(example, caption("x"), "d")
    await reward.aclose()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (ClipRewardConfig(model="tiny/reader"), r"has no open_clip_config\.json"),
        (ClipRewardConfig(model="nowhere"), "nowhere: no folder"),
        (BlipRewardConfig(model="tiny/itm"), "a model of type 'blip-2'"),
        (ItmRewardConfig(model="tiny/reader"), "a model of type"),
    ],
)
def test_models_of_a_wrong_kind_are_refused(made: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        build_image_text_reward(made)
