"""The kernel against its twin in torch. ``test_gumbel_kernel.py`` runs this by Triton's interpreter, and on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capipe.models.engines.base import Sampling
from capipe.models.engines.gumbel_kernel import BLOCK, TOLERANCE, add_noise
from capipe.models.engines.hf.token_picker import TokenPicker
from capipe.models.engines.sampling import apply, apply_in_torch, gumbel_noise, kernel_runs_on

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE = 2 * BLOCK + 37  # three programs a row, the last one with little to do


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within what the noise may differ by, and a rounding of its sum with the logit."""
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours, theirs, atol=2 * TOLERANCE[0], rtol=2 * TOLERANCE[1])


def requests(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds and positions of all sizes, and temperatures of which each fourth is 0."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator) * 2
    positions = torch.randint(0, 1 << 14, (rows,), generator=generator)
    temperatures = torch.rand(rows, generator=generator) * 2 + 0.1
    temperatures[3::4] = 0
    return seeds.to(DEVICE), positions.to(DEVICE), temperatures.to(DEVICE)


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_the_kernel_runs_here() -> None:
    assert kernel_runs_on(DEVICE)


def test_noise_has_the_same_bits_but_for_the_logarithms_last_ones() -> None:
    limits = torch.iinfo(torch.long)
    seeds = torch.tensor([0, 1, -1, limits.min, limits.max, 1 << 32, 12345678901], device=DEVICE)
    positions = torch.tensor([0, 0, 7, 1, 2, 3, limits.max - 1], device=DEVICE)
    ours = add_noise(torch.zeros(7, WIDE, device=DEVICE), seeds, positions, torch.ones(7, device=DEVICE))
    theirs = gumbel_noise(seeds, positions, WIDE, DEVICE)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[0], rtol=TOLERANCE[1])
    assert float((ours == theirs).float().mean()) > 0.5  # another hash would hit none


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_type_come_out_as_from_torch(dtype: torch.dtype, cut: bool) -> None:
    seeds, positions, temperatures = requests(24, 1)
    logits = random_logits(24, 900).to(dtype)
    logits[:, 100:200] = -torch.inf  # as a grammar forbids
    top_ps = torch.linspace(0.3, 1.0, 24, device=DEVICE) if cut else None
    barred = torch.tensor([0, 7, 899], device=DEVICE)
    ours = apply(logits, seeds, positions, temperatures, top_ps, barred)
    theirs = apply_in_torch(logits, seeds, positions, temperatures, top_ps, barred)
    assert ours.dtype == torch.float32
    close(ours, theirs)
    assert torch.equal(ours[3::4], logits[3::4].float())  # greedy rows keep all they had, barred or not
    assert bool((ours[0, barred] == -torch.inf).all())
    assert torch.equal(ours.argmax(dim=-1), theirs.argmax(dim=-1))


def test_draws_are_the_same_on_many_rows() -> None:
    seeds, positions, temperatures = requests(300, 2)
    logits = random_logits(300, 800, seed=3) / 4
    ours = apply(logits, seeds, positions, temperatures, None).argmax(dim=-1)
    assert torch.equal(ours, apply_in_torch(logits, seeds, positions, temperatures, None).argmax(dim=-1))
    assert int((ours == logits.argmax(dim=-1)).sum()) < 200  # the noise decided


def test_in_place_only_where_it_may_and_can() -> None:
    seeds, positions, temperatures = requests(4, 5)
    logits = random_logits(4, 2 * WIDE)[:, ::2]
    wanted = apply_in_torch(logits, seeds, positions, temperatures, None)
    kept = logits.clone()
    close(add_noise(logits, seeds, positions, temperatures), wanted)  # columns two apart
    assert torch.equal(logits, kept)
    rows = random_logits(8, WIDE)[::2]
    wanted = apply_in_torch(rows, seeds, positions, temperatures, None)
    out = add_noise(rows, seeds, positions, temperatures, overwrite=True)  # rows two apart
    assert out.data_ptr() == rows.data_ptr()
    close(rows, wanted)
    narrow = kept.bfloat16()
    assert add_noise(narrow, seeds, positions, temperatures, overwrite=True).dtype == torch.float32
    assert torch.equal(narrow, kept.bfloat16())


def test_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert add_noise(torch.zeros(0, 40, device=DEVICE), none, none, none.float()).shape == (0, 40)


def test_the_transformers_engine_picks_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = [Sampling(0.0 if row == 2 else 0.8, 0.9 if row == 3 else 1.0, 9, row << 40) for row in range(5)]
    kernel, torch_alone = TokenPicker(samplings, DEVICE), TokenPicker(samplings, DEVICE)
    rows = list(range(5))
    for position in range(8):
        rows = rows[:1] + rows[2:] if position in (3, 6) else rows  # one leaves the batch
        logits = random_logits(len(rows), 300, seed=position)
        ours = kernel.pick(logits, rows, position)
        with monkeypatch.context() as patch:
            patch.setattr("capipe.models.engines.hf.token_picker.kernel_runs_on", lambda device: False)
            assert torch.equal(ours, torch_alone.pick(logits, rows, position))
