"""Sampling on all cores of a CPU: processes of one thread each, which read the policy's weights in shared memory.

A small model's tokens are too little work for several threads, and Python's lock lets one thread of a process run at a
time, so each core samples the captions of its own images.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...models.engines.base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    GenerationRequest,
    Prompt,
    PromptKey,
)
from ...models.engines.hf.batched_lm import BatchedLM
from ...models.engines.hf.engine import TransformersEngine, batched_lm, load_model
from ...models.images.grid import ImageGrid
from ...models.shared_weights import SharedWeights, attach, can_share, share
from ...models.worker_process import Worker
from ..build import PolicyParts
from ..policy.lora import LoRAConfig, insert_adapter
from ..recipe import Recipe

Request = GenerationRequest | ChoiceRequest
Answer = Completion | ChoiceScores


@dataclass(frozen=True)
class ModelSource:
    """What a process needs to build the sampled model. ``folder``: of its architecture, tokenizer and processor."""

    folder: str
    called: str
    grid: ImageGrid
    weights: SharedWeights
    dtype: torch.dtype | None  # of computation, as the policy's
    concurrency: int
    lora: LoRAConfig | None = None
    template_args: Mapping[str, Any] | None = None

    def engine(self) -> TransformersEngine:
        model: Any = load_model(self.folder, sees=True, called=self.called, dtype="float32", device="cpu")
        if self.lora is not None:
            insert_adapter(model.requires_grad_(False), self.lora, self.called, 0)
        attach(model, self.weights)
        lm = batched_lm(model, self.folder, self.grid, template_args=self.template_args)
        lm.computes_in = self.dtype
        return TransformersEngine(lm, self.grid, self.concurrency)


@dataclass(frozen=True)
class Cores:
    """How a CPU's threads are shared: ``processes`` that sample, 0 for the training process alone, and ``update``'s."""

    processes: int
    update: int


def cores_of(recipe: Recipe, device: torch.device, threads: int) -> Cores:
    """The shares of ``threads``: all for one phase after the other, or with overlap half for each."""
    rollout = recipe.rollout
    if rollout.engine != "transformers" or device.type != "cpu" or not can_share():
        return Cores(0, threads)
    half = threads // 2
    processes = rollout.processes
    if processes is None:
        processes = 0 if threads == 1 else half if rollout.overlap else threads
    return Cores(processes, max(1, threads - processes) if rollout.overlap else threads)


def start_processes(recipe: Recipe, parts: PolicyParts, count: int, concurrency: int) -> ProcessEngine:
    """Processes that sample from ``parts.sampled``, whose weights move to shared memory."""
    source = ModelSource(
        str(parts.folder),
        recipe.model,
        parts.grid,
        share(parts.sampled),
        parts.policy.dtype,
        concurrency,
        recipe.trained.lora,
        recipe.template_args,
    )
    return ProcessEngine(source, parts.preparing, count)


class AnsweringProcess:
    """The function of a :class:`...models.worker_process.Worker`: answers to a list of requests, in order."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._engine: TransformersEngine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, requests: Sequence[Request]) -> list[Answer | BaseException]:
        if self._engine is None or self._loop is None:
            self._loop, self._engine = asyncio.new_event_loop(), self._source.engine()
        return self._loop.run_until_complete(self._answers(self._engine, requests))

    @staticmethod
    async def _answers(engine: TransformersEngine, requests: Sequence[Request]) -> list[Answer | BaseException]:
        asked = (
            engine.generate(request) if isinstance(request, GenerationRequest) else engine.choose(request)
            for request in requests
        )
        return list(await asyncio.gather(*asked, return_exceptions=True))


class ProcessEngine:
    """Implements :class:`...models.engines.base.Engine` over ``count`` processes. ``lm``: for counting tokens only.

    Requests made together are split by prompt, in turn: the same requests always meet in the same batch, so a resumed
    run samples the same captions to the last bit.
    """

    guides = False

    def __init__(self, source: ModelSource, lm: BatchedLM, count: int) -> None:
        self.grid: ImageGrid | None = source.grid
        self.concurrency = source.concurrency * count
        self.context: int | None = lm.max_model_len
        self._lm = lm
        self._workers = [Worker[Sequence[Request], list[Any]](AnsweringProcess(source)) for _ in range(count)]
        self._locks = [asyncio.Lock() for _ in range(count)]
        self._started = [False] * count
        self._waiting: list[tuple[Request, asyncio.Future[Any]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> Completion:
        answer: Completion = await self._submit(request)
        return answer

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        answer: ChoiceScores = await self._submit(request)
        return answer

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return len(self._lm.encoder.encode(prompt))

    async def aclose(self) -> None:
        """End the processes; requests in flight fail."""
        for worker in self._workers:
            worker.kill()
        await asyncio.gather(*self._sending, return_exceptions=True)

    def _submit(self, request: Request) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if len(self._waiting) == 1:
            task = asyncio.create_task(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return future

    async def _send(self) -> None:
        """Send what waits, once the callers that started together have all queued."""
        await asyncio.sleep(0)
        jobs, self._waiting = self._waiting, []
        numbers: dict[PromptKey, int] = {}
        shares: list[list[tuple[Request, asyncio.Future[Any]]]] = [[] for _ in self._workers]
        for job in jobs:
            number = numbers.setdefault(job[0].prompt.key, len(numbers))
            shares[number % len(shares)].append(job)
        await asyncio.gather(*(self._ask(index, share) for index, share in enumerate(shares) if share))

    async def _ask(self, index: int, jobs: Sequence[tuple[Request, asyncio.Future[Any]]]) -> None:
        async with self._locks[index]:
            try:
                answers = await asyncio.to_thread(self._exchange, index, [request for request, _ in jobs])
            except Exception as error:  # the process is gone, or could not load the model
                answers = [EngineDead(f"a process that samples captions: {error}")] * len(jobs)
        for (_, future), answer in zip(jobs, answers, strict=True):
            if future.done():  # its caller was cancelled
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _exchange(self, index: int, requests: Sequence[Request]) -> list[Any]:
        worker = self._workers[index]
        if not self._started[index]:
            worker.wait_ready()
            self._started[index] = True
        worker.send(requests)
        return worker.recv()
