"""Models whose layers packing does not know are refused, and one that no list names is found out by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.base import Completion
from capipe.models.engines.hf.kv_cache import new_cache, stateful_layers
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.trainer.build import policy_class
from capipe.trainer.policy.batch import Group, pack
from capipe.trainer.policy.decoder import DecoderPolicy, reference_logps
from capipe.trainer.policy.packing_check import PackingCheck, check_packing, random_completions, unknown_layers
from capipe.trainer.weight_sync_check import WeightSyncCheck

from ...models.captioners import KINDS, random_captioner
from ..policies import IMAGE, VIDEO, image, prompt, random_model
from .test_captioners import groups as captioner_groups
from .test_captioners import policy_of

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}


def sliding() -> Any:
    """A Qwen2.5-VL whose two layers look at a window of four tokens."""
    config = random_model("qwen2.5").config
    text = config.get_text_config()
    text.layer_types, text.sliding_window = ["sliding_attention"] * 2, 4
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).double()


def hybrid() -> Any:
    """A Qwen3.5: a layer of gated deltas and one of full attention."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 256,
        "layer_types": ["linear_attention", "full_attention"], "rope_parameters": ROPE, "initializer_range": 0.3,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 57, "vision_end_token_id": 58}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **ids)).float()


def words(length: int = 6) -> PreparedPrompt:
    return PreparedPrompt(torch.arange(5, 5 + length), torch.arange(length).expand(3, -1), length, None)


class Recipe:
    model, parallel = "mine", "replicated"

    class rollout:  # noqa: N801
        engine = "transformers"


@pytest.mark.parametrize(("make", "named"), [(sliding, "sliding_attention"), (hybrid, "linear_attention")])
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


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packing_that_holds_passes(family: str, dtype: torch.dtype | None) -> None:
    policy = DecoderPolicy(random_model(family).float(), (IMAGE, VIDEO), dtype=dtype)
    seen = image(family, (1, 4, 4), 1)
    object.__setattr__(seen, "patches", seen.patches.float())
    found = check_packing(policy, prompt(policy, seen, 5, 1), "mine")
    assert found.holds and found.line().startswith("preflight: packed captions differ from plain ones by ")
    assert max(found.first, found.last) < (1e-4 if dtype is None else 1.0) and found.autocast == (dtype is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_holds_for_captioners(kind: str) -> None:
    assert unknown_layers(random_captioner(kind)) is None
    found = check_packing(policy_of(kind), captioner_groups(kind)[0].prompt, kind)
    assert max(found.first, found.last) < 1e-4


def test_a_running_state_is_found_out_in_the_last_caption() -> None:
    policy = DecoderPolicy(hybrid(), (IMAGE, VIDEO))
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


def test_no_number_is_no_agreement() -> None:
    nan = float("nan")
    assert (
        not PackingCheck(nan, 0.0, nan, autocast=False).holds and not PackingCheck(nan, 0.0, nan, autocast=True).holds
    )
    assert not PackingCheck(0.0, nan, nan, autocast=False).holds
    assert not PackingCheck(0.0, 2e-3, 1e-4, autocast=False).holds and PackingCheck(0.0, 0.5, 0.05, autocast=True).holds


@pytest.mark.parametrize("leaks", [False, True])
def test_the_probe_packs_a_text_behind_itself(leaks: bool) -> None:
    policy = DecoderPolicy(hybrid() if leaks else random_model("qwen2.5").float())
    tokens = tuple(range(10, 30))
    with torch.no_grad():
        logprobs = tuple(reference_logps(policy, words(), tokens).tolist())
    written = Completion("", tokens, "stop", len(tokens), logprobs)
    probe = WeightSyncCheck(None, words(), policy, 1e-3)  # type: ignore[arg-type]
    assert (probe.difference(written) > 0.05) == leaks and (leaks or probe.difference(written) < 1e-4)


def test_a_cache_of_running_states_is_known() -> None:
    assert stateful_layers(new_cache(hybrid().config.get_text_config(), growing=False)) == ["LinearAttentionLayer"]
    for model in (sliding(), random_model("qwen3")):
        assert stateful_layers(new_cache(model.config.get_text_config(), growing=False)) == []


async def test_the_transformers_engine_refuses_what_it_cannot_draw_with(tmp_path: Path) -> None:
    for file in folder_of("captioner").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    hybrid().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"running state \(linear_attention\), which .* take --engine vllm") as told:
        await load_engine(EngineConfig("transformers", str(tmp_path), device="cpu"))
    assert "\n" not in str(told.value)
