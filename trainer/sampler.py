"""Rollout engine and its weight sync with the policy.

The transformers engine computes with the policy's own modules, or with a copy of them. vLLM, in this process or behind
a URL, reads each step's weights from a folder; then a probe checks that it uses them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import BadInput
from ..models.engines.base import Engine, Prompt
from ..models.engines.context import image_tokens, text_room
from ..models.engines.hf.engine import TransformersEngine, batched_lm
from ..models.engines.http.engine import HTTPOptions
from ..models.engines.http.server import server_urls
from ..models.engines.loading import vllm_runs
from ..models.engines.router import connect_servers
from ..models.engines.sampling import vision_ids
from ..models.engines.vllm.config import VLLMOptions
from ..models.engines.vllm.engine import VLLMEngine, start_vllm_engine
from .build import PolicyParts, write_model
from .distributed import Distributed, alone_on
from .policy.decoder import DecoderPolicy
from .policy.fsdp import copy_weights
from .recipe import Recipe
from .weight_sync_check import WeightSyncCheck

SYNC_FOLDER = "sampling"  # in a run's --out
PROBE_EXACT, PROBE_BF16 = 1e-3, 0.1  # nats; 1e-4 was observed in float32 with correct weights


@runtime_checkable
class Reloadable(Engine, Protocol):
    """An engine that reads new weights from a folder. Raises EngineDead."""

    async def reload(self, folder: Path) -> None: ...


@dataclass
class Sampler:
    """The rollout engine with its weight sync.

    ``copy``: updates the engine's modules, if they are not the policy's own. ``write``: writes the weights to
    ``folder``, for engines that read them there. ``probe``: None if engine and policy share their modules, so that
    there is nothing to check. ``sleeps``: the engine frees its memory during updates.
    """

    engine: Engine
    distributed: Distributed
    copy: Callable[[], None] | None = None
    write: Callable[[Path], None] | None = None
    folder: Path | None = None
    probe: WeightSyncCheck | None = None
    sleeps: bool = False
    shared: bool = False  # one engine for all processes, updated by the first

    async def sync(self, step: int) -> float | None:
        """Send the current weights to the engine; returns the probe's difference, if there is a probe.

        A collective call for all processes, while nothing is being sampled. Raises RunFailed and EngineDead.
        """
        if self.copy is not None:
            self.copy()
        if self.write is not None and self.folder is not None:
            if self.distributed.first:
                await asyncio.to_thread(self.write, self.folder)
            self.distributed.wait()
            await self._reload(self.folder)
            self.distributed.wait()
        return await self.check(step)

    async def _reload(self, folder: Path) -> None:
        if self.sleeps and isinstance(self.engine, VLLMEngine):
            await self.engine.wake()
        if isinstance(self.engine, Reloadable) and (self.distributed.first or not self.shared):
            await self.engine.reload(folder)

    async def check(self, step: int) -> float | None:
        """Run the probe only."""
        return None if self.probe is None else await self.probe.check(self.engine, step)

    async def rest(self) -> None:
        """Free the engine's memory for the update, after a step's rollout."""
        if self.sleeps and isinstance(self.engine, VLLMEngine):
            await self.engine.sleep()

    async def aclose(self) -> None:
        await self.engine.aclose()


async def build_sampler(recipe: Recipe, parts: PolicyParts, out: Path, shown: Prompt) -> Sampler:
    """Start the rollout engine of ``recipe.rollout``; ``shown``: the probe's prompt.

    Raises BadInput if vLLM is not installed or no server answers, RunFailed if the engine has other weights.
    """
    rollout, model = recipe.rollout, parts.sampled
    separate = model is not parts.policy.model
    copy = partial(copy_weights, parts.policy, model) if separate else None
    if rollout.engine == "transformers":
        lm = batched_lm(model, str(parts.folder), parts.grid, template_args=recipe.template_args)
        lm.computes_in = parts.policy.dtype
        return Sampler(TransformersEngine(lm, parts.grid, rollout.group * 16), parts.distributed, copy)
    engine: Engine = _vllm(recipe, parts) if rollout.engine == "vllm" else await _connected(recipe, parts)
    folder = Path(rollout.sync_folder) if rollout.sync_folder else out / SYNC_FOLDER
    probing = DecoderPolicy(
        model, dtype=parts.policy.dtype
    )  # temperature 1, no banned ids: as in vLLM's log-probabilities
    on_cpu = next(model.parameters()).device.type == "cpu"
    tolerance = rollout.probe or (PROBE_EXACT if on_cpu else PROBE_BF16)
    probe = WeightSyncCheck(shown, parts.preparing.prepare(shown), probing, tolerance)
    write = partial(write_model, parts)
    sampler = Sampler(engine, parts.distributed, copy, write, folder, probe, rollout.sleep, rollout.engine != "vllm")
    try:
        if (
            sampler.shared or parts.state is not None
        ):  # a server's weights may be of an earlier run, vLLM's are the start
            await sampler.sync(0)
        else:
            await sampler.check(0)
    except BaseException:
        await engine.aclose()
        raise
    return sampler


def _vllm(recipe: Recipe, parts: PolicyParts) -> Engine:
    rollout = recipe.rollout
    if not vllm_runs():
        raise BadInput("rollout.engine vllm: vLLM is not installed here; use transformers, or install capipe[vllm]")
    context = image_tokens(parts.grid) + text_room([recipe.prompt], rollout.max_tokens)
    options = VLLMOptions(
        str(parts.folder),
        parts.grid,
        max_model_len=min(parts.preparing.max_model_len, context),
        gpu_memory_utilization=rollout.gpu_memory,
        trained=True,
        template_args=recipe.template_args,
    )
    with alone_on(parts.policy.device):
        return start_vllm_engine(options)


async def _connected(recipe: Recipe, parts: PolicyParts) -> Engine:
    barred = tuple(vision_ids(parts.policy.model.config))
    options = HTTPOptions("", token_ids=True, barred=barred, template_args=recipe.template_args)
    return await connect_servers(options, server_urls(recipe.rollout.engine), all_needed=True)
