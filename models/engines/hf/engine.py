"""Transformers engine, for any device of torch: waiting requests are batched, and batches run on one worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....errors import BadInput
from ...halving import by_halves
from ...images.grid import ImageGrid
from ...pretrained import load_weights
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
)
from ..captioner_registry import KINDS, kind_of
from ..chat_templates import open_encoder, refuse_arguments
from ..prompting import CaptionerEncoder, PromptEncoder
from .batched_lm import BatchedLM, SampledTokens, SequenceRow
from .captioner_adapter import check_parts, end_ids, is_captioner, start_id
from .folded_attention import fold_heads
from .kv_cache import is_recurrent, new_cache, stateful_layers
from .model_adapter import HYBRIDS, PreparedImage, PreparedPrompt
from .patch_embedding import multiply_patches
from .window_attention import batch_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = GenerationRequest | ChoiceRequest
Answer = Completion | ChoiceScores

DEFAULT_CONCURRENCY = {"cpu": 32, "cuda": 64}
CHOICE_ROOM = 0.5  # of a generation's share of a batch: a choice is over after the prompt, and shares most of that


@dataclass(frozen=True)
class _Job:
    request: Request
    future: asyncio.Future[Any]


@dataclass
class _Known:
    """Preparations for a batch so far: each image once for all its prompts, each prompt once for all requests."""

    prompts: dict[PromptKey, PreparedPrompt | RequestError] = field(default_factory=dict)
    images: dict[str, PreparedImage] = field(default_factory=dict)
    choices: dict[tuple[str, ...], list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready:
    job: _Job
    key: PromptKey
    prompt: PreparedPrompt
    choice_ids: list[int]


class TransformersEngine:
    """Implements :class:`~.engine.Engine`. Requests that wait together share a batch and the prompts' prefixes."""

    guides = False
    batches = True

    def __init__(self, lm: BatchedLM, grid: ImageGrid | None, concurrency: int, keep_prepared: bool = False) -> None:
        """``keep_prepared``: the latest batch's prompts and patches stay in memory, for :meth:`prepared`."""
        self.lm = lm
        self._keep_prepared = keep_prepared
        self.grid = grid
        self.concurrency = concurrency
        self.context: int | None = lm.max_model_len
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="capipe-transformers")
        self._batcher: asyncio.Task[None] | None = None
        self._dead: str | None = None
        self._latest: dict[int, tuple[Prompt, PreparedPrompt]] = {}  # of the latest batch, by id()
        self._loop: asyncio.AbstractEventLoop

    async def generate(self, request: GenerationRequest) -> Completion:
        answer: Completion = await self._submit(request)
        return answer

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        answer: ChoiceScores = await self._submit(request)
        return answer

    async def thinks(self) -> bool:
        return self.lm.encoder.thinking is not None

    async def count_tokens(self, prompt: Prompt) -> int | None:
        ids = await asyncio.get_running_loop().run_in_executor(self._thread, self.lm.encoder.encode, prompt)
        return len(ids)

    def prepared(self, prompt: Prompt) -> PreparedPrompt | None:
        """What the latest batch prepared for this very object, if kept: a trainer scores what was sampled after it."""
        given, prepared = self._latest.get(id(prompt), (None, None))
        return prepared if given is prompt else None

    async def aclose(self) -> None:
        """Let the running batch finish, fail waiting requests, free the thread."""
        self._die("the engine was closed")
        if self._batcher is not None:
            self._batcher.cancel()
            await asyncio.gather(self._batcher, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def generate_reference(self, request: GenerationRequest) -> Completion:
        """Slow reference for :meth:`generate`, for tests: transformers' own loop, one request, nothing shared."""

        def run() -> Completion:
            prompt = self.lm.prepare(request.prompt)
            drawn = self.lm.generate_reference(prompt, request.sampling, request.tempered)
            return self._completion(drawn, request.logprobs, prompt)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _submit(self, request: Request) -> Any:
        if self._dead is not None:
            raise EngineDead(self._dead)
        self._loop = asyncio.get_running_loop()
        if self._batcher is None:
            self._batcher = asyncio.create_task(self._batch_forever())
        job = _Job(request, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(job)
        return await job.future

    async def _batch_forever(self) -> None:
        jobs: list[_Job] = []
        try:
            while True:
                jobs = [await self._waiting.get()]
                await asyncio.sleep(0)  # lets callers that were started together queue before the batch closes
                room = self.concurrency - _room(jobs[0])
                while room > 0 and not self._waiting.empty():
                    jobs.append(self._waiting.get_nowait())
                    room -= _room(jobs[-1])
                jobs = [job for job in jobs if not job.future.done()]  # a caller may have been cancelled
                outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._outcomes, jobs)
                for job, outcome in zip(jobs, outcomes, strict=True):
                    _settle(job, outcome)
        except BaseException as error:
            # Cancelled by aclose, or a fault of this loop itself: fail all requests.
            self._die(self._dead or f"{type(error).__name__}: {error}")
            for job in jobs:
                _settle(job, EngineDead(self._dead))
            raise

    def _die(self, reason: str) -> None:
        self._dead = self._dead or reason
        while not self._waiting.empty():
            _settle(self._waiting.get_nowait(), EngineDead(self._dead))

    def _outcomes(self, jobs: Sequence[_Job]) -> list[Answer | Exception]:
        """One outcome per job, in order. Runs on the worker thread."""
        known = _Known()
        self._latest = {}
        prepared = [self._prepare(job, known) for job in jobs]
        ready = [item for item in prepared if isinstance(item, _Ready)]
        if self._keep_prepared:
            self._latest = {id(item.job.request.prompt): (item.job.request.prompt, item.prompt) for item in ready}
        answers = iter(self._answers(ready))
        return [next(answers) if isinstance(item, _Ready) else item for item in prepared]

    def _prepare(self, job: _Job, known: _Known) -> _Ready | Exception:
        request = job.request
        key = request.prompt.key
        if key not in known.prompts:
            try:
                known.prompts[key] = self.lm.prepare(request.prompt, known.images)
            except RequestError as error:
                known.prompts[key] = error
            except Exception as error:  # a processor that rejects an image or text: an error of this request alone
                known.prompts[key] = Rejected(f"{type(error).__name__}: {error}")
        prompt = known.prompts[key]
        if isinstance(prompt, RequestError):
            return prompt
        choices = request.continuations if isinstance(request, ChoiceRequest) else ()
        try:
            if choices not in known.choices:
                known.choices[choices] = self.lm.encoder.choice_ids(choices)
        except RequestError as error:
            return error
        return _Ready(job, key, prompt, known.choices[choices])

    def _answers(self, ready: Sequence[_Ready]) -> list[Answer | Exception]:
        """Answer a batch; where the model fails on it, its halves, down to the request at fault."""
        outcomes = by_halves(ready, self._computed)
        return [_refusal(outcome) if isinstance(outcome, Exception) else outcome for outcome in outcomes]

    def _computed(self, ready: Sequence[_Ready]) -> Sequence[Answer | Exception]:
        if self._dead is None:
            try:
                with self.lm.precision():
                    return self._compute(ready)
            except torch.AcceleratorError as error:  # after a device fault nothing can be computed in this process
                self._dead = f"{type(error).__name__}: {error}"
        return [EngineDead(self._dead)] * len(ready)

    def _compute(self, ready: Sequence[_Ready]) -> list[Answer]:
        """Answer a batch, in parts of requests with the same number of beams."""
        parts: dict[int, list[int]] = {}
        for at, item in enumerate(ready):
            request = item.job.request
            beams = request.sampling.beams if isinstance(request, GenerationRequest) else 1
            parts.setdefault(beams, []).append(at)
        answers: dict[int, Answer] = {}
        for places in parts.values():
            answers |= zip(places, self._compute_part([ready[at] for at in places]), strict=True)
        return [answers[at] for at in range(len(ready))]

    def _compute_part(self, ready: Sequence[_Ready]) -> list[Answer]:
        distinct = {item.key: item.prompt for item in ready}
        index_of = {key: index for index, key in enumerate(distinct)}
        prefix = self.lm.prefill(list(distinct.values()))
        answers: dict[int, Answer] = {}
        rows: dict[int, SequenceRow] = {}
        for at, item in enumerate(ready):
            request = item.job.request
            if isinstance(request, GenerationRequest):
                rows[at] = SequenceRow(index_of[item.key], request.sampling, request.logprobs, request.tempered)
            else:
                scores = prefix.logits[index_of[item.key]].log_softmax(dim=-1)[item.choice_ids]
                prompt_tokens, image_tokens = self._prompt_counts(item.prompt)
                answers[at] = ChoiceScores(tuple(scores.tolist()), "", prompt_tokens, image_tokens)
        places = list(rows)

        def ended(row: int, drawn: SampledTokens) -> None:
            at = places[row]
            answers[at] = self._completion(drawn, rows[at].logprobs, ready[at].prompt)
            # The caller of this request need not wait for the rest of the batch.
            self._loop.call_soon_threadsafe(_settle, ready[at].job, answers[at])

        if rows:
            self.lm.decode(prefix, list(rows.values()), ended)
        return [answers[at] for at in range(len(ready))]

    def _completion(self, drawn: SampledTokens, logprobs: bool, prompt: PreparedPrompt) -> Completion:
        text, thought = self.lm.encoder.answer(drawn.token_ids)
        prompt_tokens, image_tokens = self._prompt_counts(prompt)
        return Completion(
            text=text,
            token_ids=tuple(drawn.token_ids),
            finish_reason="stop" if drawn.stopped else "length",
            n_tokens=len(drawn.token_ids),
            logprobs=tuple(drawn.logprobs) if logprobs else None,
            thought=thought,
            prompt_tokens=prompt_tokens,
            image_tokens=image_tokens,
        )

    def _prompt_counts(self, prompt: PreparedPrompt) -> tuple[int, int | None]:
        """Tokens of a prompt, and those that stand for its image."""
        image = 0 if prompt.image is None else self.lm.encoder.image_tokens(prompt.ids.tolist())
        return len(prompt.ids), image


def _refusal(error: Exception) -> Exception:
    """The error reported for a request on which the model failed."""
    if isinstance(error, EngineDead):
        return error
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        reason = f"{reason.splitlines()[0]}; give a smaller --max-pixels or --concurrency"
    return RequestError(reason)


def _room(job: _Job) -> float:
    """A request's share of a batch: each of its beams is a row."""
    return CHOICE_ROOM if isinstance(job.request, ChoiceRequest) else float(job.request.sampling.beams)


def _settle(job: _Job, outcome: Answer | Exception) -> None:
    if job.future.done():
        return
    if isinstance(outcome, Exception):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)


def load_transformers_engine(
    path: str,
    *,
    grid: ImageGrid | None,
    called: str = "",
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    concurrency: int | None = None,
    share_prefixes: bool = True,
    template_args: Mapping[str, Any] | None = None,
) -> TransformersEngine:
    """Load a model folder, named ``called`` by the user. ``dtype="auto"``: bfloat16 on CUDA, float32 on a CPU.

    ``share_prefixes=False`` computes every distinct prompt whole, which is only slower.
    """
    model = load_model(path, sees=grid is not None, called=called, dtype=dtype, device=device)
    lm = batched_lm(model, path, grid, max_model_len, share_prefixes, template_args)
    return TransformersEngine(lm, grid, concurrency or DEFAULT_CONCURRENCY.get(model.device.type, 32))


def load_model(
    path: str, *, sees: bool, called: str = "", dtype: str = "auto", device: str = "auto"
) -> PreTrainedModel:
    """The weights of a folder on their device, in evaluation mode. Raises BadInput where some are missing."""
    import transformers

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = (torch.bfloat16 if where.type == "cuda" else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    captioner = kind_of(Path(path))
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    loader: Any = auto if captioner is None else getattr(transformers, captioner.architecture)
    model: PreTrainedModel = load_weights(loader, path, dtype=kind, called=called or path).to(where).eval()
    speed_up(model, sees)
    return model


def speed_up(model: PreTrainedModel, sees: bool) -> None:
    """Replace slow parts of a loaded model by faster ones with the same results."""
    fold_heads(model)
    if sees:
        visual = getattr(model.base_model, "visual", None)
        multiply_patches(visual)
        batch_windows(visual)


def _refuse_states(model: PreTrainedModel, path: str) -> None:
    """Raise BadInput for a model whose layers keep a running state, unless its prompts may be padded.

    A recurrent layer reads padding, and a batch's rows can be selected from some states alone.
    """
    config = model.config.get_text_config()
    cache = new_cache(config, growing=False)
    if stateful_layers(cache) or (is_recurrent(cache) and config.model_type not in HYBRIDS):
        kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
        raise BadInput(
            f"{path}: {type(model).__name__} has layers that keep a running state ({', '.join(kinds) or 'recurrent'}), "
            "which the transformers engine supports for Qwen3.5 alone; take --engine vllm, or the URL of a server"
        )


def batched_lm(
    model: PreTrainedModel,
    path: str,
    grid: ImageGrid | None,
    max_model_len: int | None = None,
    share_prefixes: bool = True,
    template_args: Mapping[str, Any] | None = None,
) -> BatchedLM:
    """The model with the tokenizer, the chat template and the image processor of its folder.

    Raises BadInput for captioners with parts that do not fit together, and for templates as
    :func:`..chat_templates.open_encoder`.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    images = None
    if grid is not None and is_captioner(model):
        check_parts(model, grid.factor)
        images = AutoImageProcessor.from_pretrained(
            path, do_resize=False, do_center_crop=False, trust_remote_code=False
        )
        placeholder = getattr(model.config, "image_token_id", None)
        prompted = KINDS[model.config.model_type].prompted
        refuse_arguments(template_args or {}, type(model).__name__)
        encoder: PromptEncoder = CaptionerEncoder(tokenizer, placeholder, start_id(model), prompted)
    else:
        _refuse_states(model, path)
        image_token = None if grid is None else model.config.image_token_id
        encoder = open_encoder(Path(path), tokenizer, image_token, template_args)
        if grid is not None:
            size = {"shortest_edge": grid.min_pixels, "longest_edge": grid.max_pixels}
            images = AutoImageProcessor.from_pretrained(path, size=size, trust_remote_code=False)
    room = model.config.get_text_config().max_position_embeddings
    return BatchedLM(
        model,
        images,
        encoder,
        end_ids(model, tokenizer.eos_token_id),
        min(room, max_model_len or room),
        share_prefixes,
    )
