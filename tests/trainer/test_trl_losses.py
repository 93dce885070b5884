"""Losses and advantages against TRL's own code: its trainer, built as a user builds it, given our tensors.

All of it is TRL's own but the log-probabilities that its loss takes, and the rewards: these are given.
Without TRL, test_losses.py and test_advantages.py have the closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from capipe.trainer.advantages import Baseline, advantages
from capipe.trainer.losses import (
    LOSSES,
    ClipRange,
    Correction,
    CorrectionMode,
    PolicyLoss,
    Tokens,
    Totals,
    correction_weights,
    kl_tokens,
    token_weights,
)

MEND = "to compare with TRL: pip install --no-deps trl==1.16.0 accelerate"
pytest.importorskip("accelerate", reason=MEND)
pytest.importorskip("trl", minversion="1.16", reason=MEND)
pytestmark = [
    pytest.mark.slow,  # TRL takes ten seconds to import
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM versions"),
]

ROWS, LONGEST, LIMIT, BETA = 8, 13, 16, 0.07
CLIP = ClipRange(0.2, 0.28, cap=1.25)
# Ours by TRL's options. GSPO is GRPO's mean over completions with one ratio for each. CISPO's cap is ``epsilon_high``
# itself, as in arXiv 2510.13786, where arXiv 2506.13585 writes 1 + epsilon (and sets no lower bound either). Averages
# over tokens are over those of all micro-batches (``num_items_in_batch``), Dr. GRPO's over ``max_completion_length``.
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon_high": CLIP.high},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_high": CLIP.high},
    "dapo": {"loss_type": "dapo", "epsilon_high": CLIP.high},
    "gspo": {"loss_type": "grpo", "epsilon_high": CLIP.high, "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": CLIP.cap},
}
Make = Callable[..., Any]


@dataclass(frozen=True)
class Padded:
    """Completions as TRL has them: (rows, longest), float64; ``mask`` is 1 on a completion's tokens."""

    logp: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor


@pytest.fixture(scope="module")
def batch() -> Padded:
    """Eight completions of one to thirteen tokens; the policy has moved far since they were sampled."""
    noise = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    lengths = torch.tensor([1, 13, 7, 4, 9, 2, 13, 5])
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    old = -normal(ROWS, LONGEST).abs() - 0.1
    moved = torch.tensor([0.5, -0.6, 0.4, -0.4, 0.02, -0.02, 0.6, -0.5], dtype=torch.float64)  # by completion
    logp = old + moved[:, None] + 0.3 * normal(ROWS, LONGEST)
    weights = torch.tensor([1.2, -0.9, -0.3, 0.0, 0.7, -1.4, 1.1, 0.4], dtype=torch.float64)
    return Padded(logp, old, logp + 0.2 * normal(ROWS, LONGEST), weights, mask)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a trainer of TRL's, by default GRPO's, of a random language model; options are those of its config."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from capipe.models.bundled import resolve

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny/captioner"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(folder)

    def trainer(kind: str = "GRPO", rewards: Any = lambda completions, **rest: [0.0] * ROWS, **options: Any) -> Any:
        import trl
        from datasets import Dataset

        config = getattr(trl, f"{kind}Config")(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", num_generations=4,
            max_completion_length=LIMIT, **options,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": ["describe the image"]})
        return getattr(trl, f"{kind}Trainer")(
            model=str(folder), reward_funcs=rewards, args=config, train_dataset=prompts, processing_class=tokenizer
        )

    return trainer


def theirs(trainer: Any, batch: Padded, parts: int, on_policy: bool) -> tuple[float, Tensor]:
    """TRL's loss, summed over micro-batches as its loop sums their gradients, and the gradient at ``batch.logp``."""
    logp = batch.logp.clone().requires_grad_()
    trainer.current_gradient_accumulation_steps = parts  # as the loop sets it
    trainer.model.train()
    total = 0.0
    for rows in torch.arange(ROWS).chunk(parts):
        trainer._get_per_token_logps_and_entropies = lambda *_, rows=rows, **__: (
            logp[rows],
            torch.zeros(len(rows), LONGEST),
            None,
        )
        ids = torch.ones(len(rows), 1, dtype=torch.long)
        given = {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": torch.ones_like(batch.mask[rows]),
            "completion_mask": batch.mask[rows],
            "advantages": batch.advantages[rows],
            "old_per_token_logps": None if on_policy else batch.old[rows],
            "ref_per_token_logps": batch.ref[rows],
            "num_items_in_batch": batch.mask.sum(),  # of all micro-batches
        }
        loss = trainer.compute_loss(trainer.model, given)
        loss.backward()
        total += loss.item()
    assert logp.grad is not None
    return total, logp.grad


def ours(name: str, batch: Padded, beta: float, parts: int, on_policy: bool) -> tuple[float, Tensor]:
    """The same of ours, put together as the updater does it: flat tokens, totals of the whole batch."""
    logp = batch.logp.clone().requires_grad_()
    totals = Totals(ROWS, int(batch.mask.sum()), LIMIT)
    total = 0.0
    for rows in torch.arange(ROWS).chunk(parts):
        inside, lengths = batch.mask[rows].bool(), batch.mask[rows].sum(1)
        now = logp[rows][inside]
        old = now.detach() if on_policy else batch.old[rows][inside]
        row = torch.arange(len(rows)).repeat_interleave(lengths)
        tokens = Tokens(now, old, batch.advantages[rows][row], row, len(rows))
        values = LOSSES[name].of_token(tokens, CLIP) + beta * kl_tokens(now, batch.ref[rows][inside], "k3")
        loss = (values * token_weights(row, lengths, LOSSES[name].aggregation, totals)).sum()
        loss.backward()
        total += loss.item()
    assert logp.grad is not None
    return total, logp.grad


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_value_and_gradient_are_those_of_trl(
    make: Make, batch: Padded, name: str, beta: float, parts: int, on_policy: bool
) -> None:
    trainer = make(
        beta=beta,
        use_bias_correction_kl=False,  # the divergence as arXiv 2402.03300 eq. 4 has it, without TRL's ratio before it
        epsilon=CLIP.low,
        per_device_train_batch_size=ROWS // parts,
        gradient_accumulation_steps=parts,
        **OPTIONS[name],
    )
    value, gradient = ours(name, batch, beta, parts, on_policy)
    expected, slope = theirs(trainer, batch, parts, on_policy)
    assert value == pytest.approx(expected, rel=1e-6)
    # Weights of tokens are float32, 6e-8 apart; everything else float64.
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-12)
    assert gradient[batch.mask.bool()].any() and not gradient[~batch.mask.bool()].any()


def test_the_batch_is_held_on_both_sides(batch: Padded) -> None:
    """Or the comparison would say nothing of clipping: by token, by completion, and at CISPO's cap."""
    difference = (batch.logp - batch.old) * batch.mask
    means = (difference.sum(1) / batch.mask.sum(1)).exp()[:, None].expand_as(difference)
    for ratio in (difference.exp(), means):
        above = (ratio > 1 + CLIP.high) & (batch.mask > 0)
        below = (ratio < 1 - CLIP.low) & (batch.mask > 0)
        for side in (above, below):  # on each side some are cut and some, for the other sign of A, are not
            assert (side & (batch.advantages > 0)[:, None]).any() and (side & (batch.advantages < 0)[:, None]).any()
    assert (difference.exp() > CLIP.cap).any()


KINDS: dict[Baseline, tuple[str, dict[str, Any]]] = {
    "group_std": ("GRPO", {"scale_rewards": "group"}),
    "group_mean": ("GRPO", {"scale_rewards": "none"}),
    "leave_one_out": ("RLOO", {"normalize_advantages": False}),
}
REWARDS = {
    "scored": [1.0, 2.0, 6.0, 0.25, 0.5, 0.125, 0.75, -1.0],
    "some not": [None, 2.0, 6.0, 0.25, None, None, 0.75, -1.0],
    "tied": [0.5, 0.5, 0.5, 0.5, None, 1.0, 1.0, 1.0],
    "one alone": [None, None, 3.0, None, 1.0, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize("case", list(REWARDS))
@pytest.mark.parametrize("baseline", list(KINDS))
def test_advantages_are_those_of_trl(make: Make, baseline: Baseline, case: str) -> None:
    """TRL samples eight completions, two groups of four, and scores them; None where there is no reward."""
    kind, options = KINDS[baseline]
    rewards = REWARDS[case]
    trainer = make(kind, lambda completions, **rest: rewards, per_device_train_batch_size=ROWS, **options)
    found = trainer._generate_and_score_completions([{"prompt": "describe the image"}] * ROWS)["advantages"]
    scores = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
    expected = torch.cat([advantages(group, baseline) for group in scores.split(4)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)  # TRL's are float32


# --- correction of rollouts -------------------------------------------------------------------------------------------

MODES: tuple[CorrectionMode, ...] = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CUT = 1.4  # some ratios above it, by token and by completion


def sampling_logps(batch: Padded) -> Tensor:
    """Log-probabilities when sampled, some way from those before the update, ``batch.old``."""
    noise = torch.Generator().manual_seed(3)
    apart = torch.tensor([0.1, -0.05, 0.0, 0.2, -0.1, 0.4, 0.02, -0.3], dtype=torch.float64)[:, None]
    return batch.old - apart - 0.1 * torch.randn(ROWS, LONGEST, generator=noise, dtype=torch.float64)


def rollout_of(trainer: Any, batch: Padded, sampled: Tensor) -> dict[str, Any]:
    """TRL's own rollout step as if vLLM had sampled: tokens and log-probabilities are given, all else is its own."""
    lengths = batch.mask.sum(1).tolist()
    kept = [row[:length].tolist() for row, length in zip(sampled, lengths, strict=True)]
    tokens = [[1] * length for length in lengths]
    completions = [[{"role": "assistant", "content": "a"}]] * ROWS
    trainer.use_vllm = True  # only now: a trainer that is made so starts vLLM
    trainer._generate = lambda prompts: ([[1]] * ROWS, tokens, None, completions, kept, {}, None, None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (batch.old, None, None)
    found: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": "describe the image"}] * ROWS)
    return found


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("mode", MODES)
def test_corrections_are_those_of_trl(
    make: Make, batch: Padded, monkeypatch: pytest.MonkeyPatch, mode: CorrectionMode, name: str
) -> None:
    """The weights, and loss and gradient with them; old log-probabilities are the policy's own on both sides."""
    trainer = make(
        epsilon=CLIP.low,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=CUT,
        per_device_train_batch_size=ROWS,
        **OPTIONS[name],
    )
    inside, lengths = batch.mask.bool(), batch.mask.sum(1)
    row = torch.arange(ROWS).repeat_interleave(lengths)
    sampled = sampling_logps(batch).float().double()  # TRL keeps them as float32
    ratio = rollout_of(trainer, batch, sampled)["importance_sampling_ratio"]
    weights, capped = correction_weights(batch.old[inside], sampled[inside], row, ROWS, Correction(mode, CUT))
    torch.testing.assert_close(weights, ratio.expand_as(batch.mask)[inside], rtol=1e-6, atol=1e-12)
    assert 0 < capped.sum() < len(capped)

    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, given: compute(model, {**given, "importance_sampling_ratio": ratio})
    expected, slope = theirs(trainer, batch, 1, on_policy=False)
    of_token = LOSSES[name].of_token

    def corrected(tokens: Tokens, clip: ClipRange) -> Tensor:
        return of_token(tokens, clip) * weights

    monkeypatch.setitem(LOSSES, name, PolicyLoss(corrected, LOSSES[name].aggregation))
    value, gradient = ours(name, batch, 0.0, 1, on_policy=False)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-12)


def test_trl_corrects_as_we_do_by_default(make: Make) -> None:
    trainer = make()
    assert trainer.vllm_importance_sampling_correction and trainer.vllm_importance_sampling_clip_min is None
    theirs = Correction(trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max)
    assert theirs == Correction()
