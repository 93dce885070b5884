"""The fast path gives the log-probabilities and the gradients of the plain way, which shares nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capipe.trainer.policy.batch import Group, micro_batches, pack, packed_columns
from capipe.trainer.policy.decoder import DecoderPolicy, pick, reference_logps
from capipe.trainer.policy.padded_batch import pack_padded

from ..policies import IMAGE, VIDEO, groups, random_model

FAMILIES = ("qwen2.5", "qwen3")
BANNED = (IMAGE, VIDEO)


def gradients(policy: DecoderPolicy) -> Tensor:
    weights = [weight for weight in policy.parameters() if weight.grad is not None]
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])


def slow(policy: DecoderPolicy, made: list[Group]) -> Tensor:
    return torch.cat([reference_logps(policy, g.prompt, c.token_ids) for g in made for c in g.completions])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_equal_the_plain_way(family: str, checkpointing: bool) -> None:
    policy = DecoderPolicy(random_model(family), BANNED, temperature=0.8)
    made = groups(policy, family)
    weight = torch.randn(sum(g.tokens() for g in made), dtype=torch.float64)
    plain = slow(policy, made)
    (plain * weight).sum().backward()
    expected = gradients(policy)
    policy.zero_grad()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    fast = policy(pack(made)).logp
    (fast * weight).sum().backward()
    assert (fast - plain).abs().max() < 1e-5  # the head's last step is float32 in both
    assert (gradients(policy) - expected).norm() / expected.norm() < 1e-5
    assert fast.std() > 0.1  # tokens differ, so that agreeing means something


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_is_within_the_bound(family: str) -> None:
    policy = DecoderPolicy(random_model(family).float(), BANNED)
    made = groups(policy, family)
    for group in made:
        if group.prompt.image is not None:
            object.__setattr__(group.prompt.image, "patches", group.prompt.image.patches.float())
    plain = slow(policy, made)
    plain.mean().backward()
    expected = gradients(policy)
    policy.zero_grad()
    fast = policy(pack(made)).logp
    fast.mean().backward()
    assert (fast - plain).abs().max() < 1e-5
    assert (gradients(policy) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_row_equals_padded_rows(family: str) -> None:
    policy = DecoderPolicy(random_model(family), BANNED)
    made = groups(policy, family)
    found = []
    for batch in (pack(made), pack_padded(made)):
        scores = policy(batch)
        (scores.logp.sum() + scores.entropy.sum()).backward()
        found.append((scores.logp.detach(), gradients(policy)))
        policy.zero_grad()
    (logp, gradient), (padded_logp, padded_gradient) = found
    assert (logp - padded_logp).abs().max() < 1e-6
    assert (gradient - padded_gradient).norm() / gradient.norm() < 1e-6


def test_nothing_is_padded() -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    made = groups(policy, "qwen2.5")
    batch, tokens = pack(made), sum(len(g.prompt.ids) + g.tokens() for g in made)
    completions = sum(len(g.completions) for g in made)
    assert batch.ids.shape == (1, packed_columns(made)) == (1, tokens - completions)  # the last token predicts nothing
    assert policy.hidden(batch).shape[1] == batch.ids.shape[1] < pack_padded(made).ids.numel()


def test_micro_batches_sum_to_the_whole() -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    made = groups(policy, "qwen2.5")
    policy(pack(made)).logp.sum().backward()
    expected = gradients(policy)
    policy.zero_grad()
    parts = micro_batches(made, 40)
    assert len(parts) > 1 and sorted(g.uid for part in parts for g in part) == ["a", "b", "c", "d"]
    assert all(len(part) == 1 or packed_columns(part) <= 40 for part in parts)
    sizes = [packed_columns([part[0]]) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    for part in parts:
        policy(pack(part)).logp.sum().backward()
    assert (gradients(policy) - expected).norm() / expected.norm() < 1e-6


def test_a_completion_does_not_see_its_siblings() -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    made = groups(policy, "qwen2.5")[:1]
    alone = [Group("a", "a", made[0].prompt, [each]) for each in made[0].completions]
    together = policy(pack(made)).logp
    apart = torch.cat([policy(pack([each])).logp for each in alone])
    assert (together - apart).abs().max() < 1e-6


def test_what_stands_for_pixels_has_no_probability() -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    free = DecoderPolicy(policy.model)
    made = groups(policy, "qwen2.5")
    batch = pack(made)
    scores, unbanned = policy(batch), free(batch)
    assert (scores.logp > unbanned.logp).all()  # their share goes to the others
    assert scores.entropy.isfinite().all() and scores.entropy.shape == (len(batch.targets),)
    forbidden = pack([Group("a", "a", made[0].prompt, [made[0].completions[0].__class__("", (IMAGE,), "stop", 1)])])
    assert policy(forbidden).logp.item() == -torch.inf


def test_each_image_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    made = groups(policy, "qwen2.5")
    seen: list[int] = []
    look = policy.base.get_image_features
    monkeypatch.setattr(
        policy.base,
        "get_image_features",
        lambda patches, grids, **k: seen.append(len(grids)) or look(patches, grids, **k),
    )
    policy(pack([*made, *made]))
    assert seen == [2]  # two distinct images in six prompts with images


def test_a_frozen_tower_gets_no_gradients_and_builds_no_graph() -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    made = groups(policy, "qwen2.5")
    policy.base.visual.requires_grad_(False)
    assert not policy.look([made[0].prompt]).pooler_output[0].requires_grad
    policy(pack(made)).logp.sum().backward()
    assert all(weight.grad is None for weight in policy.base.visual.parameters())
    assert all(weight.grad is not None for weight in policy.base.language_model.layers.parameters())


def test_an_empty_completion_cannot_be_packed() -> None:
    policy = DecoderPolicy(random_model("qwen2.5"), BANNED)
    made = groups(policy, "qwen2.5")[:1]
    with pytest.raises(ValueError, match="without completions"):
        pack([Group("a", "a", made[0].prompt, [])])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(family: str) -> None:
    policy = DecoderPolicy(random_model(family), BANNED).train()
    batch = pack(groups(policy, family))
    computed: list[int] = []
    for layer in policy.base.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: computed.append(1))
    found = []
    for times in (1, 2):
        logp = policy(batch).logp
        logp.sum().backward()
        found.append((logp.detach(), gradients(policy)))
        assert len(computed) == times * len(policy.base.language_model.layers)
        computed.clear()
        policy.zero_grad()
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    (logp, gradient), (logp_again, gradient_again) = found
    assert torch.equal(logp, logp_again)
    assert (gradient - gradient_again).norm() / gradient.norm() < 1e-12


def test_gradients_of_rows_picked_often_are_the_same_bytes_each_time() -> None:
    """Indexing gave other last bits in every third of these passes, on two threads."""
    made = torch.Generator().manual_seed(0)
    places = torch.randint(0, 480, (700,), generator=made)
    places[::3], places[1::40] = 11, 7
    told = torch.randn(700, 64, generator=made)
    rows = torch.randn(480, 64, generator=made)

    def gradient() -> Tensor:
        leaf = rows.clone().requires_grad_()
        pick(leaf, places).backward(told)
        assert leaf.grad is not None
        return leaf.grad

    first = gradient()
    expected = torch.zeros(480, 64, dtype=torch.float64)
    for place, row in zip(places.tolist(), told.double(), strict=True):
        expected[place] += row
    assert torch.equal(pick(rows, places), rows[places])
    assert (first - expected).abs().max() < 1e-4
    assert all(torch.equal(gradient(), first) for _ in range(100))
