"""The noise of :mod:`.sampling` as one Triton kernel: each logit is read once and written once.

The torch code there is the reference and makes some seventy passes over the matrix. Random bits are the same; the two
logarithms are each library's own and differ in their last bits, so values agree within :data:`TOLERANCE` and samples
are the same except where two tokens are that close to each other.

For CUDA and ROCm. With ``TRITON_INTERPRET=1`` in the environment before Triton is imported it runs on CPU tensors, very
slowly, for tests. Launched outside of CUDA graphs: vLLM captures the model's forward pass, and its sampler, logits
processors included, follows in plain Python (``v1/worker/gpu/model_runner.py: sample_tokens``). The launch would be
safe inside a graph as well: it allocates nothing when in place, waits for nothing and reads parameters from the device.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads annotations of kernels: any but its own are errors.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gumbel_bits import (
    BITS,
    GOLDEN_32,
    GOLDEN_64,
    LARGEST_BELOW_ONE,
    MURMUR_1,
    MURMUR_2,
    SPLITMIX_1,
    SPLITMIX_2,
)

TOLERANCE = 3e-7, 3e-7  # absolute and relative difference of the noise to the torch code's, on a CPU or CUDA
BLOCK = 2048  # logits per program
WARPS = 4

_WORD_64, _WORD_32 = (1 << 64) - 1, (1 << 32) - 1  # the torch code has these numbers as signed ones
_GOLDEN_64, _GOLDEN_32 = tl.constexpr(GOLDEN_64 & _WORD_64), tl.constexpr(GOLDEN_32 & _WORD_32)
_SPLITMIX_1, _SPLITMIX_2 = tl.constexpr(SPLITMIX_1 & _WORD_64), tl.constexpr(SPLITMIX_2 & _WORD_64)
_MURMUR_1, _MURMUR_2 = tl.constexpr(MURMUR_1 & _WORD_32), tl.constexpr(MURMUR_2 & _WORD_32)
_MASK, _SCALE, _LARGEST = tl.constexpr((1 << BITS) - 1), tl.constexpr(2.0**-BITS), tl.constexpr(LARGEST_BELOW_ONE)


def add_noise(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    barred: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """:func:`.sampling.apply` without the cut by ``top_p``: float32 ``(rows, vocab)``, all tensors on one device.

    ``logits``: any floating type. Rows of temperature 0 are unchanged; in place they are not even read.
    """
    rows, vocab_size = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    overwrite = overwrite and logits.dtype == torch.float32
    out = logits if overwrite else torch.empty(rows, vocab_size, dtype=torch.float32, device=logits.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(logits):  # Triton starts kernels on the current device; nothing on a CPU
        _noise_kernel[rows, triton.cdiv(vocab_size, BLOCK)](
            out,
            logits,
            out.stride(0),
            logits.stride(0),
            seeds.contiguous(),
            positions.contiguous(),
            temperatures.contiguous(),
            barred,
            vocab_size,
            barred_count=0 if barred is None else len(barred),
            in_place=overwrite,
            block=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # a product fused with a sum rounds once less, and Triton's versions differ in it
        )
    return out


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * _SPLITMIX_1
    x = (x ^ (x >> 27)) * _SPLITMIX_2
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * _MURMUR_1
    x = (x ^ (x >> 13)) * _MURMUR_2
    return x ^ (x >> 16)


@triton.jit
def _noise(seed, position, tokens):
    """Gumbel noise of int32 ``tokens``; ``seed`` and ``position`` are uint64 scalars."""
    key = _mix64(_mix64(seed + _GOLDEN_64) + (position + 1) * _GOLDEN_64)
    hashed = _mix32(tokens.to(tl.uint32) * _GOLDEN_32 + key.to(tl.uint32))
    hashed = _mix32(hashed ^ (key >> 32).to(tl.uint32))
    uniform = ((hashed & _MASK).to(tl.int32).to(tl.float32) + 0.5) * _SCALE
    uniform = tl.minimum(uniform, _LARGEST)
    # log1p via log, which the interpreter has, too: the log of the rounded difference plus the rounding error. Exact to
    # the last bits also where the variate is tiny and the noise large, which is what decides samples.
    rest = 1.0 - uniform
    return -tl.log(-(tl.log(rest) + ((1.0 - rest) - uniform)))


@triton.jit
def _noise_kernel(
    out_ptr,
    logits_ptr,
    out_stride,
    logits_stride,
    seeds_ptr,
    positions_ptr,
    temperatures_ptr,
    barred_ptr,
    vocab_size,
    barred_count: tl.constexpr,
    in_place: tl.constexpr,
    block: tl.constexpr,
):
    """One program per row and block of its logits."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * block + tl.arange(0, block)
    inside = tokens < vocab_size
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
        position = tl.load(positions_ptr + row).to(tl.uint64, bitcast=True)
        logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=inside, other=0.0).to(tl.float32)
        for number in tl.static_range(barred_count):
            logits = tl.where(tokens == tl.load(barred_ptr + number).to(tl.int32), float("-inf"), logits)
        drawn = tl.div_rn(logits, temperature) + _noise(seed, position, tokens)
        tl.store(out_ptr + row * out_stride + tokens, drawn, mask=inside)
    else:
        if not in_place:
            kept = tl.load(logits_ptr + row * logits_stride + tokens, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + row * out_stride + tokens, kept, mask=inside)
