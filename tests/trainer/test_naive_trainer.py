"""An update of capipe's trainer against one that shares no code with it (naive_trainer.py): the weights' change."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from capipe.models.engines.base import Completion
from capipe.trainer.losses import LOSSES, ClipRange, Correction
from capipe.trainer.policy.batch import Group, RewardResult
from capipe.trainer.policy.critic import CriticConfig, ValueHead
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.update import UpdateConfig, UpdateMetrics, Updater

from . import naive_trainer
from .naive_trainer import Sequence, Settings
from .policies import IMAGE, VIDEO, completion, image, prompt, random_model

FAMILY, BANNED, RATE = "qwen2.5", [IMAGE, VIDEO], 0.02
LENGTHS = ((5, 3, 1), (4, 2), (3, 3), (2, 4))
SCORES: tuple[tuple[float | None, ...], ...] = ((1.0, 0.2, 0.5), (0.3, 0.9), (0.4, 0.4), (None, 0.7))  # the third tied
OFFSETS = (0.0, -0.12, 0.3, -0.5, 0.05)  # log-probability when sampled - the policy's, by completion
SAMPLED = [name for name, loss in LOSSES.items() if loss.captions == "sampled"]  # test_update.py has the others
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def model_of(seed: int) -> Any:
    return random_model(FAMILY, seed, layers=1)


def sampled_groups(policy: DecoderPolicy) -> tuple[list[Group], list[list[Sequence]]]:
    """The same completions for both trainers: an image, a tie, an unscored one, truncated ones, penalties."""
    seen = image(FAMILY, (1, 4, 4), 1)
    ours: list[Group] = []
    theirs: list[list[Sequence]] = []
    offsets = iter(OFFSETS * 3)
    for number, (lengths, scores) in enumerate(zip(LENGTHS, SCORES, strict=True)):
        prepared = prompt(policy, seen if number == 0 else None, 3 + number, number)
        inputs: dict[str, Any] = {"input_ids": prepared.ids[None]}
        if number == 0:
            kinds = (prepared.ids == IMAGE).int()[None]
            inputs |= {"pixel_values": seen.patches, "image_grid_thw": seen.grid, "mm_token_type_ids": kinds}
        made, sequences = [], []
        for place, (length, value) in enumerate(zip(lengths, scores, strict=True)):
            drawn = completion(length, 100 * number + place)
            penalties = [-0.1 * (at % 2) for at in range(length)] if number == 1 else []
            made.append(drawn)
            cut = (number, place) in ((0, 0), (1, 1))
            sequences.append(Sequence(inputs, list(drawn.token_ids), value, cut, penalties, [next(offsets)] * length))
        group = Group(str(number), str(number), prepared, made)
        group.rewards = [RewardResult(each.score, {}, each.penalties) for each in sequences]
        ours.append(group)
        theirs.append(sequences)
    return ours, theirs


def of_product(settings: Settings) -> UpdateConfig:
    critic = None
    if settings.lam is not None:
        critic = CriticConfig(
            settings.gamma, settings.lam, settings.value_weight, settings.value_clip, settings.whiten, detach=False
        )
    return UpdateConfig(
        loss=settings.loss,
        baseline=settings.baseline,  # type: ignore[arg-type]
        critic=critic,
        clip=ClipRange(settings.low, settings.high, settings.cap),
        kl=settings.kl,
        kl_in=settings.kl_in,  # type: ignore[arg-type]
        estimator=settings.estimator,  # type: ignore[arg-type]
        correction=None if settings.correction is None else Correction(settings.correction, settings.correction_cap),  # type: ignore[arg-type]
        entropy=settings.entropy,
        limit=settings.limit,
        budget=40,  # several micro-batches
        max_norm=settings.max_norm,
        mask_truncated=settings.mask_truncated,
        epochs=settings.epochs,
        minibatches=settings.minibatches,
    )


def head_of(settings: Settings) -> ValueHead | None:
    if settings.lam is None:
        return None
    torch.manual_seed(7)
    head = ValueHead(32).double()
    torch.nn.init.normal_(head.linear.weight, std=0.1)  # values that matter from the first step on
    return head


def difference(settings: Settings, updates: int = 1) -> tuple[float, UpdateMetrics]:
    """Relative difference of the weights' changes, |ours - theirs| / |theirs|, and the last update's metrics."""
    torch.set_default_dtype(torch.float64)  # of the naive trainer's constants
    try:
        reference = model_of(5).requires_grad_(False)
        policy = DecoderPolicy(model_of(0), BANNED, settings.temperature, head_of(settings))
        frozen = DecoderPolicy(model_of(5).requires_grad_(False), BANNED, settings.temperature)
        model, head = model_of(0), head_of(settings)
        groups, sequences = sampled_groups(policy)
        for group, each in zip(groups, sequences, strict=True):
            for place, sequence in enumerate(each):
                with torch.no_grad():
                    start = naive_trainer.score(model, None, sequence, BANNED, settings.temperature).logp
                sequence.sampled = (start + torch.tensor(sequence.sampled)).tolist()
                reason = "length" if sequence.truncated else "stop"
                group.completions[place] = Completion(
                    "", tuple(sequence.tokens), reason, len(sequence.tokens), tuple(sequence.sampled)
                )
        mine = [*policy.parameters()]
        linear = [] if head is None else [*head.linear.parameters()]
        others = [*model.parameters(), *linear]
        before = torch.cat([weight.detach().flatten() for weight in mine]).clone()
        config = of_product(settings)
        updater = Updater(policy, torch.optim.SGD(mine, lr=RATE), config, lambda batch: frozen(batch).logp)
        optimizer = torch.optim.SGD(others, lr=RATE)
        for _ in range(updates):
            metrics = updater.update(groups, settings.off_policy)
            naive_trainer.update(
                model, None if head is None else head.linear, reference, optimizer, sequences, BANNED, settings
            )
        ours = torch.cat([weight.detach().flatten() for weight in mine]) - before
        theirs = torch.cat([weight.detach().flatten() for weight in others]) - before
        assert theirs.norm() > 1e-6
        return float((ours - theirs).norm() / theirs.norm()), metrics
    finally:
        torch.set_default_dtype(torch.float32)


def with_critic(loss: str, **options: Any) -> Settings:
    critic = {"lam": 0.95, "value_clip": 0.2} if loss == "ppo" else {"lam": 1.0, "whiten": False}
    return Settings(loss=loss, **({**critic, **options} if loss in ("ppo", "a2c") else options))


QUICK = {
    "grpo, k3": Settings(kl=0.3),
    "dr_grpo, reward, entropy": Settings("dr_grpo", "group_mean", kl=0.1, kl_in="reward", entropy=0.05),
    "dapo, sequence_mask, epochs": Settings(
        "dapo", "leave_one_out", correction="sequence_mask", epochs=2, minibatches=2
    ),
    "gspo, token_truncate, cut": Settings("gspo", correction="token_truncate", mask_truncated=True, epochs=2),
    "cispo, k2, off-policy": Settings("cispo", kl=0.3, estimator="k2", off_policy=True, minibatches=2),
    "ppo, reward, epochs": with_critic("ppo", kl=0.2, kl_in="reward", epochs=2, minibatches=2, mask_truncated=True),
    "a2c, reward, sequence_truncate": with_critic("a2c", kl=0.2, kl_in="reward", correction="sequence_truncate"),
    "a2c, token_mask, off-policy": with_critic("a2c", whiten=True, correction="token_mask", off_policy=True),
    "ppo, clipped gradient, k2": with_critic("ppo", kl=0.2, estimator="k2", max_norm=0.5, entropy=0.02),
}


@pytest.mark.parametrize("name", list(QUICK))
def test_an_update_is_that_of_a_naive_trainer(name: str) -> None:
    assert difference(QUICK[name])[0] < 1e-4


def test_a_second_update_starts_anew() -> None:
    assert difference(Settings("dapo", kl=0.1, kl_in="reward", minibatches=2, correction="sequence_mask"), 2)[0] < 1e-4


def matrix() -> Iterator[Settings]:
    """All losses, KL kinds, epochs x minibatches and masks."""
    kinds: list[dict[str, Any]] = [
        {},
        {"kl": 0.3, "estimator": "k2"},
        {"kl": 0.3, "estimator": "k3"},
        {"kl": 0.2, "kl_in": "reward"},
    ]
    masks: list[dict[str, Any]] = [{}, {"mask_truncated": True}, *({"correction": mode} for mode in MODES)]
    steps: list[dict[str, Any]] = [{}, {"epochs": 2, "minibatches": 2}]
    for loss, kind, step, mask in product(SAMPLED, kinds, steps, masks):
        yield with_critic(loss, **kind, **step, **mask)


@pytest.mark.slow
@pytest.mark.parametrize("loss", SAMPLED)
def test_all_updates_are_those_of_a_naive_trainer(loss: str) -> None:
    cases = [settings for settings in matrix() if settings.loss == loss]
    assert len(cases) == 48
    wrong = {str(settings): found for settings in cases if (found := difference(settings)[0]) >= 1e-4}
    assert wrong == {}


def test_the_cases_differ() -> None:
    """Or agreement would say nothing: a correction, its cap, a mask and where the KL is change the weights."""
    options: list[dict[str, Any]] = [{}, *({"correction": mode} for mode in MODES)]
    options += [{"mask_truncated": True}, {"off_policy": True}, {"kl": 0.2}, {"kl": 0.2, "kl_in": "reward"}]
    losses = [round(difference(Settings("dapo", **each))[1].norm, 9) for each in options]
    assert len(set(losses)) == len(losses)
