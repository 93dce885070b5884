"""Pictures drawn from a caption: seeded by the caption, drawn once, compared by features, with a standard error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from capipe.errors import BadInput
from capipe.models.engines.base import Completion
from capipe.models.tiny.world.corpus import samples
from capipe.trainer.advantages import RewardTerm
from capipe.trainer.dataset import Example
from capipe.trainer.rewards.base import RewardManager

pytest.importorskip("diffusers")
from capipe.models.diffusion import Painter
from capipe.models.images.decode import ImageLimits
from capipe.models.images.preprocess import decode_preprocessed
from capipe.trainer.rewards.reconstruction import (
    ReconstructionConfig,
    ReconstructionReward,
    _Asked,
    build_reconstruction_reward,
    mean_and_error,
    seed_of,
)

from ...small_models import diffusion, vgg_net
from .test_judge import examples


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"model": str(diffusion(folder / "diffusion")), "features": str(vgg_net(folder / "vgg"))}


@pytest.fixture
def shown(tmp_path: Path) -> list[Example]:
    images = [sample.image for sample in samples(2, "heldout", seed=5)]
    return examples(tmp_path / "a.tar", one=images[0], two=images[1])


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was drawn, in order."""
    drawn: list[tuple[str, int]] = []
    paint = Painter.paint

    def counted(self: Painter, wanted: Sequence[tuple[str, int]]) -> Tensor:
        drawn.extend(wanted)
        return paint(self, wanted)

    monkeypatch.setattr(Painter, "paint", counted)
    return drawn


@pytest.fixture
async def reward(models: dict[str, str]) -> AsyncIterator[ReconstructionReward]:
    made = build_reconstruction_reward(config(models))
    yield made
    await made.aclose()


def config(models: dict[str, str], **settings: Any) -> ReconstructionConfig:
    return ReconstructionConfig(**models, **{"steps": 2, "guidance": 3.0, "samples": 3, "batch": 4, **settings})


def caption(text: str) -> Completion:
    return Completion(text, (1,), "stop", 1)


async def test_it_is_the_mean_similarity_of_seeded_pictures(reward: ReconstructionReward, shown: list[Example]) -> None:
    captions = ("a red star", "two blue circles on a white background")
    asked = [(example, text) for example in shown for text in captions]
    found = await asyncio.gather(*(reward.score(example, caption(text), "d") for example, text in asked))
    net, painter = reward._net, reward._painter
    other = ReconstructionReward(painter, net, reward._config)
    batch = [_Asked(example.uid, await reward._views.of(example), text) for example, text in asked]
    for similarities, scored in zip(other._similarities(batch), found, strict=True):  # as on a GPU
        assert similarities == pytest.approx(scored.details["similarities"], abs=1e-4)
    await other.aclose()
    for (example, text), scored in zip(asked, found, strict=True):
        views = decode_preprocessed(example.read(), preprocesses=(net.preprocess(),), limits=ImageLimits())
        assert isinstance(views, tuple)
        original = net.vectors_of_pixels([views[0]])[0]
        drawn = torch.cat([painter.paint([(text, seed_of(example.uid, number))]) for number in range(3)])
        own = (net.vectors(drawn) @ original).tolist()
        assert scored.details["similarities"] == pytest.approx(own, abs=1e-4)
        assert scored.value == pytest.approx(mean(own), abs=1e-4)
        assert scored.details["se"] == pytest.approx(stdev(own) / 3**0.5, abs=1e-4) and scored.details["se"] > 0


async def test_what_was_drawn_is_not_drawn_again(
    reward: ReconstructionReward, shown: list[Example], painted: list[tuple[str, int]]
) -> None:
    same = [(shown[0], "a red star"), (shown[0], "a red star"), (shown[1], " a red star ")]
    first = await asyncio.gather(
        *(reward.score(example, caption(text), f"{n}") for n, (example, text) in enumerate(same))
    )
    assert [text for text, _ in painted] == ["a red star"] * 6 and len({seed for _, seed in painted}) == 6
    assert first[0] == first[1] != first[2]  # the same caption of another image has pictures of its own
    again = await reward.score(shown[0], caption("a red star"), "later")
    assert again == first[0] and len(painted) == 6


def test_seeds_are_of_the_image_and_the_number() -> None:
    assert seed_of("a", 0) == 534123617537517294  # on every machine, in every run
    assert len({seed_of(uid, number) for uid in ("a", "b", "a ") for number in range(4)}) == 12
    assert all(0 <= seed_of("a", number) < 2**63 for number in range(50))


async def test_captions_of_an_image_start_from_the_same_noise(
    reward: ReconstructionReward, shown: list[Example], painted: list[tuple[str, int]]
) -> None:
    """Common random numbers: equal over an image's captions, other ones for each number and each image."""
    asked = [(example, text) for example in shown[:2] for text in ("a red star", "a blue star", "two stars")]
    await asyncio.gather(*(reward.score(example, caption(text), "d") for example, text in asked))
    noise = [[seed_of(example.uid, number) for number in range(3)] for example in shown[:2]]
    for text in ("a red star", "a blue star", "two stars"):
        assert sorted(seed for drawn, seed in painted if drawn == text) == sorted([*noise[0], *noise[1]])
    assert len({*noise[0], *noise[1]}) == 6


def test_the_same_noise_makes_differences_of_captions_vary_less(reward: ReconstructionReward) -> None:
    """Variance of the difference of two captions' similarities over noise, common to both or each its own."""
    painter, net, seeds = reward._painter, reward._net, range(24)

    def similarities(text: str) -> Tensor:
        return net.vectors(painter.paint([(text, seed) for seed in seeds])) @ target

    target = net.vectors(painter.paint([("a red star", 99)]))[0]
    one, other = similarities("a red star"), similarities("a red star on the left")
    assert float((one - other).var()) < 0.5 * float(one.var() + other.var())


async def test_a_folder_keeps_what_was_drawn_for_later_runs(
    models: dict[str, str], shown: list[Example], painted: list[tuple[str, int]], tmp_path: Path
) -> None:
    async def once(**settings: Any) -> Any:
        made = build_reconstruction_reward(config(models, cache=str(tmp_path / "kept"), **settings))
        try:
            return await made.score(shown[0], caption("a red star"), "d")
        finally:
            await made.aclose()

    first = await once()
    assert len(painted) == 3 and await once() == first and len(painted) == 3
    await once(weight=2.0, batch=1)  # how fast, and what for, is no part of what is drawn
    assert len(painted) == 3
    assert await once(guidance=1.0) != first and len(painted) == 6  # other pictures
    files = sorted((tmp_path / "kept").rglob("*.npy"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(b"torn")
    assert (await once()).value == pytest.approx(first.value, abs=1e-5) and len(painted) == 9


async def test_its_standard_error_is_a_component_of_the_log(reward: ReconstructionReward, shown: list[Example]) -> None:
    judge = RewardManager({"reconstruction": reward}, {"reconstruction": RewardTerm(2.0)})
    assert judge.metrics == ["reconstruction", "reconstruction_se"]
    scored = await judge.score(shown[0], caption("a red star"), "d")
    (result,) = judge.results([scored])
    value = scored["reconstruction"].value
    assert value is not None and result.score == pytest.approx(2 * value)  # the error is no part of the score
    assert result.components == {"reconstruction": value, "reconstruction_se": scored["reconstruction"].details["se"]}


def test_the_error_of_a_single_picture_is_unknown() -> None:
    assert mean_and_error([0.5]) == (0.5, None)
    assert mean_and_error([0.0, 1.0]) == (0.5, 0.5)


def test_what_cannot_be_meant_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for settings, said in (
        ({"features": "tiny/itm"}, "tiny/itm: no feature net"),
        ({"model": models["features"]}, r"has no model_index\.json"),
        ({"layer": 99}, "no layer 99"),
        ({"size": 64}, "one size only"),
        ({"cache": str(tmp_path / "file")}, "is a file, not a folder"),
    ):
        with pytest.raises(BadInput, match=said):
            build_reconstruction_reward(config({**models, **settings}))  # type: ignore[dict-item]
