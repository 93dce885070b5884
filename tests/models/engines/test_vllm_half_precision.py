"""A vLLM that computes in bfloat16, as on a GPU: it gets bfloat16, and the probe's bound is another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capipe.errors import RunFailed
from capipe.models.engines.base import ImageInput
from capipe.models.engines.vllm.weight_sync import Precision, read_weights
from capipe.trainer.sampling.weight_sync_check import tolerance

from .test_vllm_weight_sync import LLM_ONLY, changed, probe_of, send_weights, started

pytest.importorskip("vllm")
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_it_gets_its_own_type(
    pictures: list[ImageInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # restored afterwards
    engine = started(dtype="bfloat16")
    try:
        precision = await engine.precision()
        assert precision == Precision("bfloat16", "bfloat16")
        model = changed(1, LLM_ONLY)
        await send_weights(engine, model, tmp_path, everything=False)
        assert {weight.dtype for _, weight in read_weights(tmp_path, everything=False)} == {torch.bfloat16}
        probe = probe_of(model, pictures[0])
        with pytest.raises(RunFailed, match="differ by"):
            await probe.check(engine, 0)  # within the bound for float32
        bound = tolerance(precision, None)
        assert await probe_of(model, pictures[0], bound).check(engine, 0) < bound / 4
    finally:
        await engine.aclose()
