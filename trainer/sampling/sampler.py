"""Rollout engine and its weight sync with the policy.

The transformers engine computes with the policy's own modules, or with a copy of them. vLLM, in this process or behind
a URL, gets each step's weights (:mod:`.weight_transfer`); then a probe checks that it uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch

from ...errors import BadInput
from ...models.engines.base import Engine, Prompt
from ...models.engines.context import image_tokens, text_room
from ...models.engines.hf.engine import TransformersEngine, batched_lm
from ...models.engines.http.engine import HTTPOptions
from ...models.engines.http.server import server_urls
from ...models.engines.loading import vllm_runs
from ...models.engines.router import connect_servers
from ...models.engines.sampling import vision_ids
from ...models.engines.vllm.config import VLLMOptions
from ...models.engines.vllm.engine import VLLMEngine, start_vllm_engine
from ...models.engines.vllm.environment import allow_handles
from ...models.engines.vllm.weight_sync import Trained
from ..build import PolicyParts, empty_cache
from ..distributed import Distributed, alone_on
from ..policy.fsdp import copy_weights
from ..recipe import Recipe
from .processes import cores_of, start_processes
from .weight_sync_check import WeightSyncCheck, tolerance
from .weight_transfer.base import PolicyModel, WeightTransfer
from .weight_transfer.direct import open_direct, refuse_direct
from .weight_transfer.folder import FolderTransfer

SYNC_FOLDER = "sampling"  # in a run's --out


@runtime_checkable
class Sleeper(Protocol):
    """An engine that frees its GPU memory, weights included, between ``sleep`` and ``wake``. Raises EngineDead."""

    async def sleep(self) -> None: ...

    async def wake(self, part: Literal["weights", "kv_cache"]) -> None: ...


@dataclass
class Sampler:
    """The rollout engine with its weight sync.

    ``copy``: updates the engine's modules, if they are not the policy's own. ``transfer``: hands the weights to other
    engines. ``probe``: None if engine and policy share their modules, so that there is nothing to check. ``sleeps``:
    the engine frees its memory during updates. ``everything``: the engine does not have the frozen weights, either.
    """

    engine: Engine
    distributed: Distributed
    copy: Callable[[], None] | None = None
    transfer: WeightTransfer | None = None
    probe: WeightSyncCheck | None = None
    sleeps: bool = False
    everything: bool = False
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))

    async def sync(self, step: int) -> float | None:
        """Send the current weights to the engine; returns the probe's difference, if there is a probe.

        A collective call for all processes, while nothing is being sampled. Raises RunFailed and EngineDead.
        """
        if self.copy is not None:
            self.copy()
        if self.transfer is not None:
            await self._send_weights(self.transfer)
        return await self.check(step)

    async def _send_weights(self, transfer: WeightTransfer) -> None:
        await transfer.prepare(self.everything)
        await self._wake("weights")
        await transfer.send(self.everything)
        await self._wake("kv_cache")  # now, as memory is short while weights are loaded
        self.everything = False
        self.distributed.wait()

    async def _wake(self, part: Literal["weights", "kv_cache"]) -> None:
        if self.sleeps and isinstance(self.engine, Sleeper):
            empty_cache(self.device)
            await self.engine.wake(part)

    async def check(self, step: int) -> float | None:
        """Run the probe only; a collective call if the policy is sharded."""
        return None if self.probe is None else await self.probe.check(self.engine, step)

    async def rest(self) -> None:
        """Free the engine's memory for the update, after a step's rollout."""
        if self.sleeps and isinstance(self.engine, Sleeper):
            await self.engine.sleep()
            self.everything = True

    async def aclose(self) -> None:
        await self.engine.aclose()


async def build_sampler(recipe: Recipe, parts: PolicyParts, out: Path, shown: Prompt) -> Sampler:
    """Start the rollout engine of ``recipe.rollout``; ``shown``: the probe's prompt.

    Raises BadInput if vLLM is not installed or no server answers, RunFailed if the engine has other weights.
    """
    rollout, model = recipe.rollout, parts.sampled
    if rollout.engine == "transformers":
        copy = None if model is parts.policy.model else partial(copy_weights, parts.policy, model)
        return Sampler(_transformers(recipe, parts), parts.distributed, copy)
    device = parts.policy.device
    refuse_direct(rollout, device)
    if rollout.engine == "vllm":
        empty_cache(device)  # vLLM takes a share of what is free
    engine = _vllm(recipe, parts) if rollout.engine == "vllm" else await _connected(recipe, parts)
    try:
        sampler = await _connect(recipe, parts, engine, out, shown)
        if sampler.everything:  # a server may hold other weights, from an earlier run, and vLLM older ones
            await sampler.sync(0)
        else:
            await sampler.check(0)
    except BaseException:
        await engine.aclose()
        raise
    return sampler


def _transformers(recipe: Recipe, parts: PolicyParts) -> Engine:
    """The engine in this process, or on a CPU with several threads in processes of its own."""
    concurrency = max(2, recipe.rollout.group) * 16
    cores = cores_of(recipe, parts.policy.device, torch.get_num_threads())
    torch.set_num_threads(cores.update)
    if cores.processes:
        return start_processes(recipe, parts, cores.processes, concurrency)
    lm = batched_lm(parts.sampled, str(parts.folder), parts.grid, template_args=recipe.template_args)
    lm.computes_in = parts.policy.dtype
    return TransformersEngine(lm, parts.grid, concurrency, keep_prepared=True)


async def _connect(recipe: Recipe, parts: PolicyParts, engine: Engine, out: Path, shown: Prompt) -> Sampler:
    """A started vLLM, or servers, with the way in which their weights get there, and the check of it."""
    assert isinstance(engine, Trained)
    rollout, policy, distributed = recipe.rollout, parts.policy, parts.distributed
    precision = await engine.precision()
    model, servers = PolicyModel(policy.model, precision), rollout.engine != "vllm"
    transfer: WeightTransfer
    if rollout.sync == "direct":
        transfer = await open_direct(model, engine, distributed, rollout)
    else:
        folder = Path(rollout.sync_folder) if rollout.sync_folder else out / SYNC_FOLDER
        transfer = FolderTransfer(model, engine, distributed, folder, shared=servers)
    nats = rollout.probe or tolerance(precision, policy.dtype)
    probe = WeightSyncCheck(shown, parts.preparing.prepare(shown), policy, nats)
    return Sampler(
        engine,
        distributed,
        transfer=transfer,
        probe=probe,
        sleeps=rollout.sleep,
        everything=servers or parts.state is not None,  # vLLM was loaded from the start's folder
        device=policy.device,
    )


def _vllm(recipe: Recipe, parts: PolicyParts) -> VLLMEngine:
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
        transfer="ipc" if rollout.sync == "direct" else None,
        template_args=recipe.template_args,
    )
    if options.transfer is not None:
        allow_handles()
    with alone_on(parts.policy.device):
        return start_vllm_engine(options)


async def _connected(recipe: Recipe, parts: PolicyParts) -> Engine:
    barred = tuple(vision_ids(parts.policy.model.config))
    options = HTTPOptions("", token_ids=True, barred=barred, template_args=recipe.template_args)
    return await connect_servers(options, server_urls(recipe.rollout.engine), all_needed=True)
