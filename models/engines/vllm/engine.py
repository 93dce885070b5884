"""vLLM, in process: this side renders prompts and images; child processes run the scheduler and the model."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...child_processes import spawned_follow
from ...images.grid import ImageGrid
from ..base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    GenerationRequest,
    Prompt,
    PromptKey,
    Rejected,
    RequestError,
    Sampling,
    among_allowed,
)
from ..chat_templates import open_encoder
from ..context import too_long
from ..decoding import no_search
from ..prompting import PromptEncoder, rgb_pixels
from ..sampling import vision_ids
from .config import VLLMOptions, engine_config
from .cpu_affinity import bound_cores, move_off, move_to
from .device_holders import device_holders
from .environment import prepare_environment
from .weight_sync import PRECISION, RELOAD, Precision

if TYPE_CHECKING:
    from psutil import Process  # type: ignore[import-untyped]
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

PromptCounts = tuple[int | None, int | None]  # tokens of a prompt, and those that stand for its image
CLOSING_SECONDS = 20.0
# Separators are regular expressions: one space or none after ":" and ",", and no other white space between values.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class VLLMEngine:
    """Implements :class:`~.engine.Engine` on vLLM's AsyncLLM; made by :func:`start_vllm_engine`."""

    guides = True

    def __init__(
        self,
        llm: AsyncLLM,
        encoder: PromptEncoder,
        grid: ImageGrid | None,
        concurrency: int,
        processes: list[Process],
        cores: set[int],
        on_cpu: bool,
        context: int,
        barred: Sequence[int] = (),
        second_runner: bool = False,
    ) -> None:
        self.grid = grid
        self._barred = barred  # ids that are never sampled
        self.context = context
        self.concurrency = concurrency
        self._llm: AsyncLLM | None = llm  # None once it is closed
        self._processes = processes
        self._on_cpu = on_cpu
        self._second_runner = second_runner
        self._cores = cores  # the cores of this process before
        self._encoder = encoder
        self._numbers = itertools.count()
        self._rendering: dict[PromptKey, asyncio.Task[Any]] = {}

    async def generate(self, request: GenerationRequest) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        from .sampling import parameters

        request.refuse_tempered("vLLM")
        if (why := self.unsupported(request.sampling)) is not None:
            raise Rejected(why, final=True)
        schema = request.json_schema
        # vLLM reports probabilities among all ids, before those that are never sampled are barred.
        barred = list(self._barred) if request.logprobs and request.sampling.temperature > 0 else []
        # The grammar's mask is applied before our noise, and what it forbids is -inf, which no noise can lift.
        guide = None if schema is None else StructuredOutputsParams(json=_with_form(schema))
        params = SamplingParams(
            **parameters(request.sampling, self._second_runner),
            logprobs=0 if request.logprobs and not barred else None,  # the sampled token's own only
            logprob_token_ids=barred or None,
            structured_outputs=guide,
        )
        output, counts = await self._run(request.prompt, params)
        ids = list(output.token_ids)
        logprobs: tuple[float, ...] | None = None
        if request.logprobs:
            assert output.logprobs is not None
            logprobs = tuple(
                among_allowed(step[token].logprob, (step[other].logprob for other in barred))
                for step, token in zip(output.logprobs, ids, strict=True)
            )
        # Guided JSON is an answer from its first token on, even where the template has opened a thought.
        text, thought = self._encoder.answer(ids) if schema is None else (self._encoder.decode(ids), None)
        return Completion(text, tuple(ids), output.finish_reason, len(ids), logprobs, thought, *counts)

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        from vllm import SamplingParams

        ids = self._encoder.choice_ids(request.continuations)
        params = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=ids)
        output, (prompt_tokens, image_tokens) = await self._run(request.prompt, params)
        assert output.logprobs is not None
        logprobs = tuple(output.logprobs[0][token].logprob for token in ids)
        return ChoiceScores(logprobs, prompt_tokens=prompt_tokens, image_tokens=image_tokens)

    def unsupported(self, sampling: Sampling) -> str | None:
        return no_search(sampling, "vLLM")

    async def thinks(self) -> bool:
        return self._encoder.thinking is not None

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return len(self._encoder.encode(prompt))

    async def precision(self) -> Precision:
        """What the engine computes in. Raises EngineDead."""
        with _or_dead("vLLM does not say what it computes in"):
            (answer, *_) = await self._alive().collective_rpc(PRECISION)
            return Precision(**answer)

    async def reload(self, folder: Path, everything: bool = True) -> None:
        """Read new weights of the same model from a folder, and drop what the old ones computed.

        ``everything``: or only those that training changes (:mod:`.weight_sync`). For an engine that was started as
        ``trained``, while it is idle. Raises EngineDead. The caller must check that the new weights are in place: vLLM
        has been seen to report success and answer with others.
        """
        with _or_dead(f"vLLM took no new weights from {folder}"):
            await self._alive().collective_rpc(RELOAD, args=(str(folder), everything))
        await self.forget()

    async def weight_update(self, command: str, **arguments: Any) -> None:
        """A command of vLLM's own weight transfer. Raises EngineDead."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        requests = {
            "init_weight_transfer_engine": WeightTransferInitRequest,
            "update_weights": WeightTransferUpdateRequest,
        }
        with _or_dead(f"vLLM took no new weights ({command})"):
            call = getattr(self._alive(), command)
            await (call(requests[command](**arguments)) if command in requests else call())

    async def forget(self) -> None:
        """Empty the caches that older weights filled. Raises EngineDead."""
        with _or_dead("vLLM's caches could not be emptied for new weights"):
            emptied = await self._alive().reset_prefix_cache()
            await self._alive().reset_mm_cache()
            await self._alive().reset_encoder_cache()
        if not emptied:
            raise EngineDead("vLLM's prefix cache is in use and could not be emptied for new weights")

    async def sleep(self) -> None:
        """Free the GPU's memory, weights included: all of them are needed anew. Does nothing on a CPU."""
        if not self._on_cpu:
            with _or_dead("vLLM did not give its memory back"):
                await self._alive().sleep(level=2)

    async def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory back: for the weights, and after they are loaded, for the cache. Nothing where it is awake."""
        if not self._on_cpu:
            with _or_dead(f"vLLM did not wake ({part}); lower rollout.gpu_memory if memory is short"):
                if await self._alive().is_sleeping():
                    await self._alive().wake_up(tags=[part])

    def _alive(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead("the engine was closed")
        return self._llm

    async def aclose(self) -> None:
        """Stop vLLM and every process it started, by force after some seconds."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        from vllm.v1.engine.exceptions import EngineDeadError

        # Fail all requests: those in flight, and those whose image is still being prepared.
        llm.output_processor.propagate_error(EngineDeadError())
        if (listener := llm.output_handler) is not None:  # or it reports the end of what it listens to as a death
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
        await asyncio.to_thread(llm.shutdown)
        llm.output_processor.propagate_error(EngineDeadError())
        await asyncio.to_thread(_see_off, self._processes)
        move_to(self._cores, [os.getpid()])
        del llm
        gc.collect()  # it is in reference cycles, and its destructor complains when it first runs at interpreter exit

    async def _run(self, prompt: Prompt, params: SamplingParams) -> tuple[CompletionOutput, PromptCounts]:
        """Send one request and wait for its end: the answer, and the tokens of the prompt. Raises RequestError or
        EngineDead, nothing else."""
        llm = self._alive()
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params.output_kind = RequestOutputKind.FINAL_ONLY  # otherwise each token would wake this process
        params.detokenize = False  # done once, at the end
        try:
            rendered = await self._rendered(llm, prompt)
            stream = llm.generate(rendered, params, str(next(self._numbers)))
            outputs: list[RequestOutput] = [output async for output in stream]
        except (RequestError, VLLMClientError) as error:
            raise error if isinstance(error, RequestError) else Rejected(str(error)) from error
        except EngineDeadError as error:
            raise EngineDead("vLLM's engine process is gone") from error
        except Exception as error:  # a processor that rejects an image, or a fault that killed the engine
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
            raise self._failure(llm, reason) from error
        completion = outputs[-1].outputs[0] if outputs else None
        if completion is None or completion.finish_reason not in ("stop", "length"):
            reason = "nothing" if completion is None else completion.finish_reason
            raise self._failure(llm, f"vLLM ended the request early: {reason}")
        return completion, self._counted(prompt, outputs[-1].prompt_token_ids)

    def _counted(self, prompt: Prompt, ids: Sequence[int] | None) -> PromptCounts:
        """``ids``: of the prompt with its image's placeholder expanded, as vLLM reports them."""
        if ids is None:
            return None, None
        return len(ids), 0 if prompt.image is None else self._encoder.image_tokens(ids)

    async def _rendered(self, llm: AsyncLLM, prompt: Prompt) -> Any:
        """The prompt as vLLM takes it; concurrent requests with the same prompt (a group's captions) share it.

        Equivalent to vLLM's ``n`` of a request, but each caption is returned when it ends and not with the last.
        """
        if (task := self._rendering.get(prompt.key)) is None:
            task = asyncio.create_task(llm.renderer.render_cmpl_async([self._vllm_prompt(prompt)]))
            self._rendering[prompt.key] = task
            task.add_done_callback(lambda _: self._rendering.pop(prompt.key, None))
        (rendered,) = await asyncio.shield(task)
        return rendered

    def _failure(self, llm: AsyncLLM, reason: str) -> RequestError | EngineDead:
        """The error of a failed request: EngineDead for an engine that dies or is closed, which aborts its requests."""
        return EngineDead(reason) if llm.errored or self._llm is None else RequestError(reason)

    def _vllm_prompt(self, prompt: Prompt) -> Any:
        from vllm import TokensPrompt

        ids = list(self._encoder.encode(prompt))
        pixels = None if prompt.image is None else rgb_pixels(prompt.image)
        seen = 0 if pixels is None or self.grid is None else pixels.shape[0] * pixels.shape[1] // self.grid.factor**2
        length = len(ids) + max(0, seen - 1)  # the image's placeholder is one of the ids
        if length >= self.context:
            raise too_long(length, self.context)
        if prompt.image is None:
            return TokensPrompt(prompt_token_ids=ids)
        # The content hash replaces vLLM's own of the pixels: one engine has one pixel grid, so the same bytes always
        # give the same pixels.
        return TokensPrompt(
            prompt_token_ids=ids,
            multi_modal_data={"image": pixels},
            multi_modal_uuids={"image": [prompt.image.uid]},
        )


@contextmanager
def _or_dead(what: str) -> Iterator[None]:
    """Raise EngineDead for any error of vLLM's."""
    try:
        yield
    except EngineDead:
        raise
    except Exception as error:
        raise EngineDead(f"{what}: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=16)
def _with_form(schema: str) -> str:
    """The schema with the JSON's format added. Raises RequestError for text that is no JSON object."""
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise RequestError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RequestError(f"the JSON schema is {type(parsed).__name__}, not an object")
    return json.dumps(parsed | {"x-guidance": JSON_FORM})


def start_vllm_engine(options: VLLMOptions) -> VLLMEngine:
    """Start vLLM's processes and wait until the model is loaded (7 s to minutes). Call it where an event loop runs.

    They end with this process, and with the calling thread. Raises BadInput for a chat template that does not work,
    before anything is started, and for user arguments that vLLM refuses; any exception where it cannot start for other
    reasons, naming other processes that hold the device.
    """
    prepare_environment()
    from transformers import AutoTokenizer
    from vllm.platforms import current_platform

    from .sampling import processor_path

    on_cpu = current_platform.is_cpu()
    concurrency = options.concurrency or (128 if on_cpu else 256)
    config = engine_config(options, on_cpu, concurrency)
    config.model_config.logits_processors = [processor_path(config.use_v2_model_runner)]
    image_token = None if options.grid is None else config.model_config.hf_config.image_token_id
    tokenizer = AutoTokenizer.from_pretrained(options.path, trust_remote_code=False)
    encoder = open_encoder(Path(options.path), tokenizer, image_token, options.template_args)
    return _launch(options, config, concurrency, encoder)


def _launch(options: VLLMOptions, config: VllmConfig, concurrency: int, encoder: PromptEncoder) -> VLLMEngine:
    # A separate function: where an optional library of vLLM's does not import, vLLM keeps that error and with it the
    # frames it passed, :func:`start_vllm_engine`'s among them, and an engine held there would never be collected.
    from vllm.v1.engine.async_llm import AsyncLLM

    others = _vllm_processes()
    try:
        with spawned_follow():
            llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        on_gpu = config.device_config.device_type == "cuda"
        if not (others_there := device_holders(on_gpu)):
            raise
        raise RuntimeError(f"{error}; the device is taken by {', '.join(others_there)}") from error
    # Recorded while all live: an orphan of a killed engine process is no longer a descendant of ours.
    processes = [process for process in _vllm_processes() if process not in others]
    pids = [process.pid for process in processes]
    cores = os.sched_getaffinity(0)
    if not options.trained:  # training alternates with it, and then needs all cores
        move_off(bound_cores(pids), [os.getpid(), *pids])
    on_cpu = config.device_config.device_type == "cpu"
    context = int(config.model_config.max_model_len)  # as determined by vLLM
    barred, second_runner = vision_ids(config.model_config.hf_config), bool(config.use_v2_model_runner)
    return VLLMEngine(llm, encoder, options.grid, concurrency, processes, cores, on_cpu, context, barred, second_runner)


def _vllm_processes() -> list[Process]:
    """The live descendants of this process that vLLM named after itself (which excludes Python's resource tracker)."""
    import psutil

    return [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM")]


def _see_off(processes: list[Process]) -> None:
    """Wait for them to end, kill those that remain, and collect their exit codes so that no zombie stays."""
    import psutil

    _, lingering = psutil.wait_procs(processes, timeout=CLOSING_SECONDS)
    for process in lingering:
        process.kill()
    psutil.wait_procs(lingering, timeout=CLOSING_SECONDS)
