"""The kernel of the noise: by Triton's interpreter on any machine, compiled for GPUs that are not here, and on CUDA.

Whether Triton interprets is decided when it is imported, so each of these is a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(Path(each, "triton").is_dir() for each in sys.path), reason="Triton is not installed"),
]
HERE = Path(__file__).parent
COMPILE = """
import os
del os.environ["TRITON_INTERPRET"]  # it was there to have Triton in sight beside a CPU-only torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from capipe.models.engines.gumbel_kernel import BLOCK, WARPS, _noise_kernel

numbers = {"out_stride": "i32", "logits_stride": "i32", "vocab_size": "i32"}
pointers = {"out_ptr": "*fp32", "seeds_ptr": "*i64", "positions_ptr": "*i64", "temperatures_ptr": "*fp32"}
for logits in ("*fp32", "*bf16", "*fp16"):
    for constants in ({"barred_count": 4, "in_place": True}, {"barred_count": 0, "in_place": False}):
        types = {**numbers, **pointers, "logits_ptr": logits, "barred_ptr": "*i64"}
        constants["block"] = BLOCK
        if not constants["barred_count"]:
            constants["barred_ptr"] = None
        names = _noise_kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        source = ASTSource(_noise_kernel, signature, constants)
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        assembly = triton.compile(source, target=GPUTarget("cuda", %d, 32), options=options).asm["ptx"]
        assert "lg2.approx" not in assembly  # of no use near 1, where the large noise is made
"""


def python(*arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints; it must end well."""
    variables = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def cases(*arguments: str, **environment: str) -> None:
    told = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment)
    assert re.search(r"\d+ passed", told) and "skipped" not in told, told[-2000:]


def test_interpreted() -> None:
    cases(str(HERE / "gumbel_kernel_cases.py"), CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_interpreted_in_vllm_s_processor() -> None:
    cases(str(HERE / "test_vllm_engine_sampling.py"), "-k", "second_runner", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    cases(str(HERE / "gumbel_kernel_cases.py"), TRITON_INTERPRET="0")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    python("-c", COMPILE % capability, TRITON_CACHE_DIR=str(tmp_path))
