"""Models whose layers packing does not know are refused, and one that no list names is found out by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3NextConfig, Qwen3NextForCausalLM

from capipe.errors import BadInput
from capipe.models.engines.base import Completion
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.trainer.build import policy_class
from capipe.trainer.policy.batch import Batch, Group, pack
from capipe.trainer.policy.decoder import DecoderPolicy, reference_logps
from capipe.trainer.policy.packing import attention
from capipe.trainer.policy.packing_check import PackingCheck, check_packing, random_completions, unknown_layers
from capipe.trainer.sampling.weight_sync_check import WeightSyncCheck

from ...models.captioners import KINDS, random_captioner
from ..policies import IMAGE, VIDEO, image, prompt, random_model
from .test_captioners import groups as captioner_groups
from .test_captioners import policy_of


def sliding() -> Any:
    """A Qwen2.5-VL whose two layers look at a window of four tokens."""
    config = random_model("qwen2.5").config
    text = config.get_text_config()
    text.layer_types, text.sliding_window = ["sliding_attention"] * 2, 4
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).double()


def other_hybrid() -> Any:
    """A Qwen3-Next: its gated delta layers are others than Qwen3.5's."""
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
            layer_types=["linear_attention", "full_attention"],
        )
    )  # fmt: skip


def unaware() -> DecoderPolicy:
    """A Qwen3.5 whose gated delta layers read a packed row as one text."""
    policy = DecoderPolicy(random_model("qwen3.5").float(), (IMAGE, VIDEO))
    for layer in policy.base.language_model.layers:
        vars(getattr(layer, "linear_attn", layer)).pop("forward", None)
    return policy


def words(length: int = 6) -> PreparedPrompt:
    return PreparedPrompt(torch.arange(5, 5 + length), torch.arange(length).expand(3, -1), length, None)


class Recipe:
    model, parallel = "mine", "replicated"

    class rollout:  # noqa: N801
        engine = "transformers"


@pytest.mark.parametrize(("make", "named"), [(sliding, "sliding_attention"), (other_hybrid, "linear_attention")])
def test_layers_that_packing_does_not_know_are_refused(make: Any, named: str) -> None:
    with pytest.raises(BadInput, match=f"mine: Qwen.* has layers of {named}, which the trainer's packing") as told:
        policy_class(make(), Recipe())  # type: ignore[arg-type]
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"alibi": True}, "ALiBi"),
        ({"layer_types": None, "sliding_window": 128, "use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_settings_that_packing_does_not_know(changed: dict[str, Any], named: str) -> None:
    model = random_model("qwen2.5")
    assert unknown_layers(model) is None
    for key, value in changed.items():
        setattr(model.config.get_text_config(), key, value)
    assert named in (unknown_layers(model) or "")


def test_sinks_are_seen_by_their_weights() -> None:
    model = random_model("qwen3")
    model.model.language_model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert unknown_layers(model) == "attention sinks"


def test_a_window_that_is_not_used_is_none() -> None:
    """As in Qwen2.5-VL's published config.json."""
    model = random_model("qwen2.5")
    text = model.config.get_text_config()
    text.layer_types, text.sliding_window, text.use_sliding_window = None, 32768, False
    assert unknown_layers(model) is None


def test_attention_refuses_what_its_tree_leaves_out() -> None:
    policy = DecoderPolicy(sliding(), (IMAGE, VIDEO))
    group = Group("a", "a", words(), random_completions(policy))
    with pytest.raises(BadInput, match="attends with sliding_window"):
        policy(pack([group]))
    assert reference_logps(policy, words(), (1, 2, 3)).shape == (3,)  # without a tree it may


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "qwen3.5"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packing_that_holds_passes(family: str, dtype: torch.dtype | None) -> None:
    policy = DecoderPolicy(random_model(family).float(), (IMAGE, VIDEO), dtype=dtype)
    seen = image(family, (1, 4, 4), 1)
    object.__setattr__(seen, "patches", seen.patches.float())
    found = check_packing(policy, prompt(policy, seen, 5, 1), "mine")
    assert found.holds and found.line().startswith("preflight: packed captions differ from plain ones by ")
    assert max(found.first, found.last) < 1e-4 and not found.autocast and policy.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_packing_holds_for_captioners(kind: str) -> None:
    assert unknown_layers(random_captioner(kind)) is None
    found = check_packing(policy_of(kind), captioner_groups(kind)[0].prompt, kind)
    assert max(found.first, found.last) < 1e-4


def test_a_running_state_is_found_out_in_the_last_caption() -> None:
    policy = unaware()
    completions = random_completions(policy)
    policy.requires_grad_(False)
    packed = policy(pack([Group("a", "a", words(), completions)])).logp.split(12)
    gaps = [
        float((each - reference_logps(policy, words(), c.token_ids)).abs().max())
        for each, c in zip(packed, completions, strict=True)
    ]
    assert gaps[0] < 1e-3 < 0.1 < gaps[2]
    with pytest.raises(BadInput, match=r"mine: .* gives packed captions other log-probabilities .*the last of 3"):
        check_packing(policy, words(), "mine")


def test_a_small_leak_is_found_in_half_precision() -> None:
    """0.015 nats were seen of a hybrid with random weights: less than bfloat16's own rounding on average."""
    policy = DecoderPolicy(random_model("qwen2.5").float(), (IMAGE, VIDEO), dtype=torch.bfloat16)
    forward = policy.hidden

    def leaking(batch: Batch) -> Tensor:
        states = forward(batch)
        states[:, -1] *= 1.01  # of the last caption
        return states

    policy.hidden = leaking  # type: ignore[method-assign]
    with pytest.raises(BadInput, match=r"other log-probabilities than single ones \(by .* the first, 0\.0"):
        check_packing(policy, words(), "mine")


def test_in_half_precision_its_own_kernels_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    attend = attention.kernel_for
    monkeypatch.setattr(attention, "kernel_for", lambda value: seen.append(value.dtype) or attend(value))
    policy = DecoderPolicy(random_model("qwen2.5").float(), (IMAGE, VIDEO), dtype=torch.bfloat16)
    check_packing(policy, words(), "mine")
    assert set(seen) == {torch.float32, torch.bfloat16}


def test_no_number_is_no_agreement() -> None:
    nan = float("nan")
    assert (
        not PackingCheck(nan, 0.0, nan, autocast=False).holds and not PackingCheck(nan, 0.0, nan, autocast=True).holds
    )
    assert not PackingCheck(0.0, nan, nan, autocast=False).holds
    assert not PackingCheck(0.0, 2e-3, 1e-4, autocast=False).holds and PackingCheck(0.0, 0.5, 0.05, autocast=True).holds


@pytest.mark.parametrize("leaks", [False, True])
def test_the_probe_packs_a_text_behind_itself(leaks: bool) -> None:
    policy = unaware() if leaks else DecoderPolicy(random_model("qwen2.5").float())
    tokens = tuple(range(10, 30))
    with torch.no_grad():
        logprobs = tuple(reference_logps(policy, words(), tokens).tolist())
    written = Completion("", tokens, "stop", len(tokens), logprobs)
    probe = WeightSyncCheck(None, words(), policy, 1e-3)  # type: ignore[arg-type]
    assert (probe.difference(written) > 0.05) == leaks and (leaks or probe.difference(written) < 1e-4)
