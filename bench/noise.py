"""Cost of the sampling noise of a decoding step: the torch code of ``models/engines/sampling.py`` against its kernel.

Bytes moved per logit are counted on any device: the torch code's from the tensors that its operators read and write (a
sort as one pass), the kernel's from its loads and stores. Times are taken on a CUDA device, with torch and Triton but
without vLLM; elsewhere they are "unmeasured". ``ratio`` is the torch code's time over the kernel's.

    python bench/noise.py [--rows 256] [--vocab 151936] [--rounds 9]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, report, version

from capipe.models.engines.sampling import apply, apply_in_torch, kernel_runs_on

COUNTED_ROWS = 16  # bytes per logit do not depend on it
STEPS = 20  # decoding steps of a round
BARRED = 4  # ids that Qwen2.5-VL bars
CASES = {"full": None, "top_p": 0.9}  # full support, and the nucleus, for which torch sorts on both sides


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that operators read and write; data repeated by a stride of 0 counts once."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = [] if func is torch.ops.aten.empty_like.default else tree_leaves((args, kwargs))
            self.moved += sum(_bytes(leaf) for leaf in (*read, *tree_leaves(result)) if isinstance(leaf, Tensor))
        return result


def _bytes(tensor: Tensor) -> int:
    values = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= size if stride else 1
    return values * tensor.element_size()


class Step:
    """A batch's logits and sampling parameters; no request is greedy."""

    def __init__(self, rows: int, vocab: int, top_p: float | None, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.logits = 3 * torch.randn(rows, vocab, generator=generator).to(device)
        self.seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator).to(device)
        self.positions = torch.randint(0, 400, (rows,), generator=generator).to(device)
        self.temperatures = torch.full((rows,), 1.25, device=device)  # makes logits shrink when computed in place
        self.top_ps = None if top_p is None else torch.full((rows,), top_p, device=device)
        self.barred = torch.arange(vocab - BARRED, vocab, device=device)

    def in_torch(self) -> Tensor:
        return apply_in_torch(self.logits, self.seeds, self.positions, self.temperatures, self.top_ps, self.barred)

    def by_kernel(self, overwrite: bool = False) -> Tensor:
        return apply(self.logits, self.seeds, self.positions, self.temperatures, self.top_ps, self.barred, overwrite)


def bytes_per_logit(vocab: int, top_p: float | None) -> dict[str, float]:
    """Bytes per logit of the torch code, and of the kernel with torch's operations before it."""
    step = Step(COUNTED_ROWS, vocab, top_p, torch.device("cpu"))
    with Traffic() as torch_code:
        step.in_torch()
    kernel = 2 * 4 * step.logits.numel()  # float32, each loaded and stored
    if top_p is not None:
        from capipe.models.engines.sampling import scaled

        with Traffic() as cut:
            scaled(step.logits, step.temperatures, step.top_ps, step.barred)
        kernel += cut.moved
    sides = {"torch": torch_code.moved, "kernel": kernel}
    return {side: round(moved / step.logits.numel(), 1) for side, moved in sides.items()}


def measure(step: Step, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Milliseconds of a step by each side, and their agreement."""
    theirs, ours = step.in_torch(), step.by_kernel()
    finite = theirs.isfinite()
    agreement = {
        "largest_difference": float((ours - theirs)[finite].abs().max()),
        "rows_drawn_alike": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "temporaries_mib": {"torch": _temporaries(step.in_torch), "kernel": _temporaries(lambda: step.by_kernel(True))},
    }
    del theirs, ours, finite
    # In place, as in vLLM: logits change from step to step, and the time does not depend on them.
    sides = {"torch": step.in_torch, "kernel": lambda: step.by_kernel(overwrite=True)}
    return alternate({name: _timed(side) for name, side in sides.items()}, rounds), agreement


def _timed(side: Callable[[], Tensor]) -> Callable[[int], float]:
    return lambda _: _milliseconds(side)


def _milliseconds(call: Callable[[], Tensor]) -> float:
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(STEPS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / STEPS


def _temporaries(call: Callable[[], Tensor]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / (1 << 20), 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cuda = torch.device("cuda") if torch.cuda.is_available() else None
    if cuda is not None and not kernel_runs_on(cuda):
        sys.exit("the kernel does not run on this device")
    moved: dict[str, dict[str, float]] = {}
    figures: dict[str, list[float]] = {}
    ratios: dict[str, Any] = {}
    devices: dict[str, dict[str, Any]] = {}
    for case, top_p in CASES.items():
        moved[case] = bytes_per_logit(options.vocab, top_p)
        ratios[case] = "unmeasured"
        if cuda is None:
            continue
        rounds, devices[case] = measure(Step(options.rows, options.vocab, top_p, cuda), options.rounds)
        figures |= {f"{side}_{case}": values for side, values in rounds.items()}
        ratios[case] = round(median(a / b for a, b in zip(rounds["torch"], rounds["kernel"], strict=True)), 2)
        traffic = moved[case]["kernel"] * options.rows * options.vocab
        devices[case]["kernel_gb_per_s"] = round(traffic / median(rounds["kernel"]) / 1e6)
    versions = {package: version(package) for package in ("torch", "triton")}
    device = "unmeasured: no CUDA device" if cuda is None else torch.cuda.get_device_name(cuda)
    report(
        "noise",
        figures,
        versions,
        unit="ms",
        rows=options.rows,
        vocab=options.vocab,
        bytes_per_logit=moved,
        device=device,
        **({"cases": devices} if devices else {}),
        ratio=ratios["full"],
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
