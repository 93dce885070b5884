"""Policies of BLIP-2, BLIP and ViT-GPT2: what packing shares changes nothing, and better captions get likelier."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from capipe.errors import BadInput
from capipe.models.engines.base import Completion, GenerationRequest, Prompt, Sampling
from capipe.models.engines.hf.captioner_adapter import barred_ids, vision_model
from capipe.models.engines.hf.engine import TransformersEngine, batched_lm, load_model
from capipe.models.engines.hf.model_adapter import PreparedImage, PreparedPrompt
from capipe.models.engines.model_folder import image_grid
from capipe.trainer.build import build_policy, parts_of, value_weights, write_policy
from capipe.trainer.policy import blip2, encoder_decoder
from capipe.trainer.policy.batch import Group, RewardResult, pack
from capipe.trainer.policy.captioner import CaptionerPolicy
from capipe.trainer.policy.critic import CriticConfig, ValueHead
from capipe.trainer.policy.optimizer import build_optimizer
from capipe.trainer.recipe import Recipe
from capipe.trainer.recipe_sections import OptimizerConfig
from capipe.trainer.update import UpdateConfig, Updater

from ...models.captioners import HIDDEN, IMAGE, KINDS, SIDE, START, VOCABULARY, random_captioner, write_captioner
from ...models.engines.test_captioners import picture


def policy_of(kind: str, **options: Any) -> CaptionerPolicy:
    """In training, as dropout must not matter, and in float64, so that only mistakes are seen."""
    model = random_captioner(kind).double()
    made = blip2.Blip2Policy if kind == "blip2" else encoder_decoder.EncoderDecoderPolicy
    return made(model, barred_ids(model), **options).train()


def reference_logps(policy: CaptionerPolicy, prompt: PreparedPrompt, tokens: Sequence[int]) -> Tensor:
    if isinstance(policy, blip2.Blip2Policy):
        return blip2.reference_logps(policy, prompt, tokens)
    assert isinstance(policy, encoder_decoder.EncoderDecoderPolicy)
    return encoder_decoder.reference_logps(policy, prompt, tokens)


def groups(kind: str) -> list[Group]:
    """Two images, one of them twice; unequal completions, one of a single token; unequal prompts where these exist."""
    images = [PreparedImage(f"{n}", torch.randn(1, 3, SIDE, SIDE).double(), torch.ones(1, 3)) for n in range(2)]
    made = []
    for number, (image, words, lengths) in enumerate([(0, 3, (7, 3, 1)), (1, 0, (2, 5)), (0, 1, (4, 4, 6))]):
        before = [START] if kind != "blip2" else [*[IMAGE] * 5, START]
        after = [] if kind == "vit-gpt2" else [Random(number).randrange(4, VOCABULARY) for _ in range(words)]
        ids = torch.tensor(before + after)
        prompt = PreparedPrompt(ids, torch.arange(len(ids))[None], len(ids), images[image])
        made.append(Group(f"{number}", f"{number}", prompt, [completion(n, 10 * number + n) for n in lengths]))
    return made


def completion(length: int, seed: int) -> Completion:
    rng = Random(f"completion {seed}")
    return Completion("", tuple(rng.randrange(4, VOCABULARY) for _ in range(length)), "stop", length)


def gradients(policy: CaptionerPolicy) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_equal_the_plain_way(kind: str, checkpointing: bool) -> None:
    policy = policy_of(kind, temperature=0.8)
    made = groups(kind)
    weight = torch.randn(sum(g.tokens() for g in made), dtype=torch.float64)
    plain = torch.cat([reference_logps(policy, g.prompt, c.token_ids) for g in made for c in g.completions])
    (plain * weight).sum().backward()
    expected = gradients(policy)
    policy.zero_grad()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    fast = policy(pack(made)).logp
    (fast * weight).sum().backward()
    assert (fast - plain).abs().max() < 2e-6  # the last step is float32 in both
    assert (gradients(policy) - expected).norm() / expected.norm() < 1e-6
    assert fast.std() > 0.1  # tokens differ, so that agreeing means something


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_do_not_depend_on_what_is_beside(kind: str) -> None:
    policy, made = policy_of(kind), groups(kind)
    batch = pack(made)
    together = policy.hidden(batch).flatten(0, 1)[batch.predicts]
    alone = [pack([Group(g.uid, g.key, g.prompt, [c])]) for g in made for c in g.completions]
    apart = torch.cat([policy.hidden(each)[0][each.predicts] for each in alone])
    assert (together - apart).abs().max() < 1e-9 and together.shape[1] == HIDDEN


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_within_the_bound(kind: str) -> None:
    policy, made = policy_of(kind).float(), groups(kind)
    plain = torch.cat([reference_logps(policy, g.prompt, c.token_ids) for g in made for c in g.completions])
    plain.mean().backward()
    expected = gradients(policy)
    policy.zero_grad()
    fast = policy(pack(made)).logp
    fast.mean().backward()
    assert (fast - plain).abs().max() < 1e-5
    assert (gradients(policy) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_encoded_once_and_a_frozen_tower_builds_no_graph(kind: str) -> None:
    policy, made = policy_of(kind), groups(kind)
    seen: list[int] = []
    tower = vision_model(policy.model)
    tower.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["pixel_values"])), with_kwargs=True)
    policy(pack(made))
    assert seen == [2]
    for part in ("vision", "projector"):
        for weight in parts_of(policy.model)[part]:
            weight.requires_grad_(False)
    assert not policy.look([made[0].prompt]).requires_grad
    policy(pack(made)).logp.sum().backward()
    assert all(weight.grad is None for weight in tower.parameters())
    assert any(weight.grad is not None for weight in parts_of(policy.model)["llm"])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_all_of_the_model(kind: str) -> None:
    model = random_captioner(kind)
    parts = {name: {id(weight) for weight in weights} for name, weights in parts_of(model).items()}
    assert sum(map(len, parts.values())) == len(list(model.parameters()))
    assert set().union(*parts.values()) == {id(weight) for weight in model.parameters()}
    if kind == "blip2":
        assert (
            id(model.query_tokens) in parts["projector"] and id(model.language_projection.weight) in parts["projector"]
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
async def test_captions_are_drawn_with_the_policys_log_probabilities(
    kind: str, temperature: float, tmp_path: Path
) -> None:
    folder = write_captioner(tmp_path / kind, kind)
    model: Any = load_model(str(folder), sees=True, dtype="float32", device="cpu")
    kept = type(policy_of(kind))(model, barred_ids(model), temperature).train()
    lm = batched_lm(model, str(folder), image_grid(folder))
    engine = TransformersEngine(lm, image_grid(folder), 8)
    kept.eval()  # as an update leaves it
    text = "" if kind == "vit-gpt2" else "a red"
    prompts = [Prompt(text, picture(seed)) for seed in range(2)]
    draws = [
        GenerationRequest(each, Sampling(temperature, 1.0, 3 * seed + 4, seed), True, tempered=True)
        for each in prompts
        for seed in range(4)
    ]
    drawn = await asyncio.gather(*map(engine.generate, draws))
    await engine.aclose()
    made = [Group(f"{n}", f"{n}", lm.prepare(prompts[n]), list(drawn[4 * n : 4 * n + 4])) for n in range(2)]
    told = torch.tensor([value for each in drawn for value in each.logprobs or ()])
    assert len({each.n_tokens for each in drawn}) > 1
    assert (kept(pack(made)).logp - told).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["ppo", "a2c"])
def test_a_step_with_a_value_head_makes_better_captions_likelier(kind: str, loss: str) -> None:
    policy = policy_of(kind, value_head=ValueHead(HIDDEN, hidden=16).double())
    for weight in parts_of(policy.model)["vision"]:
        weight.requires_grad_(False)
    config = UpdateConfig(loss=loss, critic=CriticConfig(lam=1.0, whiten=True), max_norm=1e9)
    updater = Updater(policy, torch.optim.SGD([w for w in policy.parameters() if w.requires_grad], lr=0.02), config)
    made = groups(kind)
    for group in made:
        group.rewards = [RewardResult(float(number == 0)) for number in range(len(group.completions))]
    before = policy(pack(made)).logp.detach()
    tower = [weight.clone() for weight in parts_of(policy.model)["vision"]]
    errors = [updater.update(made) for _ in range(6)]
    change = policy(pack(made)).logp.detach() - before
    first = torch.cat([torch.full((c.n_tokens,), n == 0) for g in made for n, c in enumerate(g.completions)])
    assert change[first].mean() > 0 > change[~first].mean()
    assert errors[0].skipped is None and errors[0].ratio_min == pytest.approx(1, abs=1e-5)
    assert errors[-1].value_loss < errors[0].value_loss
    assert all(map(torch.equal, tower, parts_of(policy.model)["vision"]))


def test_a_value_head_may_learn_faster_than_the_policy() -> None:
    policy = policy_of(KINDS[0], value_head=ValueHead(HIDDEN, hidden=8).double())
    built = build_optimizer(policy, OptimizerConfig(lr=1e-3, weight_decay=0.1), head_rate=50.0)
    told = {id(weight): group for group in built.param_groups for weight in group["params"]}
    assert len(told) == len([weight for weight in policy.parameters() if weight.requires_grad])
    assert policy.value_head is not None
    for weight in policy.parameters():
        mine = any(weight is each for each in policy.value_head.parameters())
        assert told[id(weight)]["scale"] == (50.0 if mine else 1.0)
        assert told[id(weight)]["weight_decay"] == (0.1 if weight.ndim >= 2 else 0.0)


def test_a_value_head_of_two_layers_begins_as_nothing_and_is_no_line() -> None:
    head, seen = ValueHead(HIDDEN, hidden=8), torch.randn(5, HIDDEN)
    assert head(seen).abs().max() == 0 and set(ValueHead(HIDDEN).state_dict()) == {"linear.weight", "linear.bias"}
    torch.nn.init.normal_(head.linear.weight)
    assert (head(seen) + head(-seen) - 2 * head(torch.zeros_like(seen))).abs().max() > 1e-2
    kept = ValueHead(HIDDEN, detach=True, hidden=8)
    kept(seen.requires_grad_()).sum().backward()
    assert seen.grad is None


def recipe(folder: Path, **more: Any) -> Recipe:
    settings = {
        "model": str(folder),
        "prompt": "",
        "data": {"shards": "unread", "questions": "unread"},
        "rewards": [{"kind": "repetition"}],
        "device": "cpu",
        "algorithm": {"loss": "ppo", "critic": {"hidden": 8}, "kl": 0.1},
        "trained": {"projector": True},
    }
    return Recipe.model_validate({**settings, **more})


@pytest.mark.parametrize("kind", KINDS)
async def test_a_checkpoint_is_a_folder_like_the_first_one(kind: str, tmp_path: Path) -> None:
    start = write_captioner(tmp_path / "start", kind)
    parts = build_policy(recipe(start))
    assert "vision frozen" in parts.learning and "projector learns" in parts.learning
    with torch.no_grad():
        for weight in parts.policy.parameters():
            weight.add_(0.01)
    image = picture(0)
    made = [Group("a", "a", parts.preparing.prepare(Prompt("", image)), [completion(5, 1), completion(3, 2)])]
    expected = parts.policy(pack(made))
    write_policy(parts, tmp_path / "kept", value_weights(parts))
    again = build_policy(recipe(start), tmp_path / "kept")
    for each in (parts, again):
        assert each.reference is not None
    found = again.policy(pack(made))
    assert torch.equal(found.logp, expected.logp) and found.values is not None
    assert expected.values is not None and torch.equal(found.values, expected.values)
    assert found.values.abs().max() > 0
    assert torch.equal(again.reference(pack(made)), parts.reference(pack(made)))  # type: ignore[misc]
    assert (again.reference(pack(made)) - found.logp).abs().max() > 1e-3  # type: ignore[misc]
    prepared = again.preparing.prepare(Prompt("", image)).image
    assert prepared is not None and made[0].prompt.image is not None
    assert torch.equal(prepared.patches, made[0].prompt.image.patches)
    engine = TransformersEngine(again.preparing, again.grid, 4)
    assert (await engine.generate(GenerationRequest(Prompt("", image), Sampling(max_tokens=4)))).n_tokens > 0
    await engine.aclose()
    for each in (parts, again):
        each.pictures.close()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vit-gpt2", {"prompt": "Describe the image."}, "reads no prompt"),
    ("blip", {"trained": {"projector": True, "llm": False}}, "nothing learns"),
    ("blip2", {"rollout": {"engine": "vllm"}}, "sampled by transformers alone"),
    ("blip2", {"parallel": "sharded"}, "cannot be split"),
    ("blip", {"trained": {"lora": {}}}, "takes an adapter"),
    ("blip2", {"trained": {"lora": {}}}, "no o_proj, gate_proj.*it has fc1, fc2, k_proj, out_proj, q_proj, v_proj"),
]


@pytest.mark.parametrize(("kind", "wrong", "reason"), REFUSED)
def test_what_cannot_be_trained_is_refused(kind: str, wrong: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = write_captioner(tmp_path / kind, kind)
    with pytest.raises(BadInput, match=reason):
        build_policy(recipe(folder, **{"algorithm": {}, **wrong}))


def test_an_adapter_of_blip2_learns_alone_and_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start = write_captioner(tmp_path / "start", "blip2")
    lora = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj", "fc1"], "dropout": 0.5}}
    parts = build_policy(recipe(start, trained=lora, algorithm={"kl": 0.1}))
    learning = [name for name, weight in parts.policy.named_parameters() if weight.requires_grad]
    assert len(learning) == 12 and all("language_model" in name and "lora_" in name for name in learning)
    made = [Group("a", "a", parts.preparing.prepare(Prompt("", picture(0))), [completion(5, 1)])]
    before = parts.policy(pack(made)).logp.detach()
    with torch.no_grad():
        for name, weight in parts.policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    changed = parts.policy(pack(made)).logp.detach()
    assert (changed - before).abs().max() > 1e-2 and parts.reference is not None
    assert torch.allclose(parts.reference(pack(made)), before)
    parts.policy.train()
    assert not torch.equal(parts.policy(pack(made)).logp, changed)  # the adapter's own dropout is on
    parts.policy.eval()
    write_policy(parts, tmp_path / "kept", {})
    merged = load_model(str(tmp_path / "kept"), sees=True, dtype="float32", device="cpu")
    found = blip2.Blip2Policy(merged, barred_ids(merged))(pack(made)).logp
    assert (found - changed).abs().max() < 1e-5
    parts.pictures.close()
