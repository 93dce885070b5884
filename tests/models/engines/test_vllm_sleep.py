"""vLLM's sleep on a GPU, which none of the tests has: what it is asked, and that its errors are the engine's death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capipe.models.engines.base import EngineDead
from capipe.models.engines.vllm.engine import VLLMEngine


class Llm:
    """vLLM's side of it."""

    def __init__(self, fails: str = "") -> None:
        self.calls, self.asleep, self.fails = list[Any](), set[str](), fails

    def called(self, name: str, *rest: Any) -> None:
        self.calls.append((name, *rest))
        if name == self.fails:
            raise RuntimeError("CUDA out of memory")

    async def sleep(self, level: int) -> None:
        self.called("sleep", level)
        self.asleep = {"weights", "kv_cache"}

    async def is_sleeping(self) -> bool:
        return bool(self.asleep)

    async def wake_up(self, tags: list[str]) -> None:
        self.called("wake_up", *tags)
        self.asleep -= set(tags)

    async def collective_rpc(self, method: str, args: Any = ()) -> list[Any]:
        self.called(method, *args)
        return [{"weights": "bfloat16", "head": "float32"}]

    async def reset_prefix_cache(self) -> bool:
        self.called("reset_prefix_cache")
        return True

    async def reset_mm_cache(self) -> None: ...

    async def reset_encoder_cache(self) -> None: ...


def engine(llm: Llm, on_cpu: bool = False) -> VLLMEngine:
    rest: Any = (None, None, 1, [], set(), on_cpu, 64)
    return VLLMEngine(llm, *rest)  # type: ignore[arg-type]


async def test_it_drops_its_weights_and_takes_memory_back_in_two_parts() -> None:
    llm = Llm()
    trained = engine(llm)
    await trained.wake("weights")
    await trained.wake("kv_cache")
    assert llm.calls == []  # it is awake
    await trained.sleep()
    await trained.wake("weights")
    await trained.reload(Path("weights"))
    await trained.wake("kv_cache")
    assert llm.calls == [
        ("sleep", 2),
        ("wake_up", "weights"),
        ("capipe_reload", "weights", True),
        ("reset_prefix_cache",),
        ("wake_up", "kv_cache"),
    ]
    assert not llm.asleep


async def test_on_a_cpu_it_does_not_sleep() -> None:
    llm = Llm()
    await engine(llm, on_cpu=True).sleep()
    await engine(llm, on_cpu=True).wake("weights")
    assert llm.calls == []


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("sleep", "did not give its memory back: RuntimeError: CUDA out of memory"),
        ("wake_up", r"did not wake \(weights\); lower rollout\.gpu_memory if memory is short: .* out of memory"),
        ("capipe_reload", "took no new weights from weights: RuntimeError"),
        ("capipe_precision", "does not say what it computes in"),
        ("reset_prefix_cache", "caches could not be emptied for new weights"),
    ],
)
async def test_its_errors_are_the_engines_death(fails: str, says: str) -> None:
    trained = engine(Llm(fails))
    with pytest.raises(EngineDead, match=says):
        await trained.precision()
        await trained.sleep()
        await trained.wake("weights")
        await trained.reload(Path("weights"))
