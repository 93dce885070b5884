"""Counter-based sampling inside vLLM: logits processors that its engine process loads by import path.

A sampled request goes to vLLM as a greedy one (``temperature=0``) whose real parameters are in ``extra_args``; the
processor adds the noise of :mod:`.sampling`, and vLLM's own argmax is then the sample. vLLM has two model runners with
an interface each: the first runs on CPUs, the second wherever Triton does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunnerProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnerProcessor

from ..base import Sampling
from ..sampling import apply, fold_seed, kernel_runs_on, penalise_, vision_ids

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTRA_KEY = "capipe_sampling"


def parameters(sampling: Sampling, second_runner: bool) -> dict[str, Any]:
    """Arguments of :class:`vllm.SamplingParams` for ``sampling``.

    The first runner applies its penalties after our noise, which they must not scale: there our processor applies them.
    """
    ours = sampling.temperature > 0 and not second_runner
    return {
        "temperature": 0.0,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "repetition_penalty": 1.0 if ours else sampling.repetition_penalty,
        "extra_args": extra_args(sampling, sampling.repetition_penalty if ours else 1.0),
    }


def extra_args(sampling: Sampling, penalty: float = 1.0) -> dict[str, Any] | None:
    """The ``extra_args`` of :class:`vllm.SamplingParams` for ``sampling``; None for a greedy request.

    ``penalty``: for repetition, by our processor.
    """
    if sampling.temperature == 0:
        return None
    return {EXTRA_KEY: [fold_seed(sampling.seed), sampling.temperature, sampling.top_p, penalty]}


def processor_path(second_runner: bool) -> str:
    """The import path for ``AsyncEngineArgs.logits_processors``, of the runner that will be used."""
    return f"{__name__}:{(SecondRunnerGumbel if second_runner else FirstRunnerGumbel).__name__}"


def _parameters(params: SamplingParams) -> tuple[int, float, float, float] | None:
    carried = (params.extra_args or {}).get(EXTRA_KEY)
    return None if carried is None else (int(carried[0]), *(float(value) for value in carried[1:4]))  # type: ignore[return-value]


def _barred(vllm_config: VllmConfig, device: torch.device) -> Tensor:
    """Ids that are never sampled: an image token in a caption would claim pixels that do not exist."""
    return torch.tensor(vision_ids(vllm_config.model_config.hf_config), dtype=torch.long, device=device)


@dataclass(frozen=True)
class _SampledRow:
    """A sampling request in the batch. ``drawn`` is vLLM's own running list of its output tokens.

    ``penalty``: for repetition of the tokens of ``prompt`` and those drawn.
    """

    seed: int
    temperature: float
    top_p: float
    penalty: float
    prompt: list[int]
    drawn: list[int]


class FirstRunnerGumbel(FirstRunnerProcessor):
    """Keeps the batch's sampling rows by index; a batch without any costs one comparison per step."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._barred = _barred(vllm_config, device)
        self._drawing: dict[int, _SampledRow] = {}
        self._stale = False
        self._rows = self._seeds = self._temperatures = torch.empty(0)
        self._top_ps: Tensor | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self._stale |= process_dict_updates(self._drawing, batch_update, self._new)

    def apply(self, logits: Tensor) -> Tensor:
        if not self._drawing:
            return logits
        if self._stale:
            self._rebuild()
        # Counted at each step instead of kept: a preempted request returns with what it had sampled.
        positions = torch.tensor([len(row.drawn) for row in self._drawing.values()], device=self._device)
        drawn = apply(
            self._penalised(logits[self._rows]),  # a copy
            self._seeds,
            positions,
            self._temperatures,
            self._top_ps,
            self._barred,
            overwrite=True,
        )
        logits[self._rows] = drawn.to(logits.dtype)
        return logits

    @staticmethod
    def _new(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _SampledRow | None:
        parameters = _parameters(params)
        return None if parameters is None else _SampledRow(*parameters, prompt_ids or [], output_ids)

    def _penalised(self, logits: Tensor) -> Tensor:
        """The sampling rows' logits with their penalties for repetition, in place."""
        for row, sampled in zip(logits, self._drawing.values(), strict=True):
            seen = sorted({*sampled.prompt, *sampled.drawn}) if sampled.penalty != 1 else []
            if seen:
                penalty = torch.tensor([sampled.penalty], device=self._device)
                penalise_(row[None], torch.tensor([seen], device=self._device), penalty)
        return logits

    def _rebuild(self) -> None:
        drawing = self._drawing.values()
        self._rows = torch.tensor(list(self._drawing), device=self._device)
        self._seeds = torch.tensor([row.seed for row in drawing], device=self._device)
        self._temperatures = torch.tensor([row.temperature for row in drawing], device=self._device)
        cut = any(row.top_p < 1 for row in drawing)
        self._top_ps = torch.tensor([row.top_p for row in drawing], device=self._device) if cut else None
        self._stale = False


class SecondRunnerGumbel(SecondRunnerProcessor):
    """Keeps parameters by request slot; slots are reused, and a slot's temperature of 0 means that it is greedy.

    vLLM calls it between its CUDA graphs, never inside one, and schedules ahead of the device, so nothing here may
    synchronise with it.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._states = req_states
        self._barred = _barred(vllm_config, req_states.device)
        slots = req_states.max_num_reqs
        self._seeds = np.zeros(slots, dtype=np.int64)
        self._temperatures = np.zeros(slots, dtype=np.float32)
        self._top_ps = np.ones(slots, dtype=np.float32)
        self._stale = False  # the columns are not on the device yet
        self._on_device = self._sent()
        if kernel_runs_on(req_states.device):  # compiled here, not in the first step that samples
            one = torch.ones(1, dtype=torch.long, device=req_states.device)
            logits = torch.zeros(1, req_states.vocab_size, device=req_states.device)
            apply(logits, one, one, one.float(), None, self._barred, overwrite=True)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        parameters = _parameters(sampling_params)
        seed, temperature, top_p, _ = parameters or (0, 0.0, 1.0, 1.0)  # vLLM's penalties come before this runner's
        before = self._seeds[req_idx], self._temperatures[req_idx], self._top_ps[req_idx]
        self._seeds[req_idx], self._temperatures[req_idx], self._top_ps[req_idx] = seed, temperature, top_p
        self._stale |= before != (self._seeds[req_idx], self._temperatures[req_idx], self._top_ps[req_idx])
        return parameters is not None

    def apply_staged_writes(self) -> None:
        if self._stale:
            self._on_device = self._sent()
            self._stale = False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        if not self._temperatures[ctx.idx_mapping_np].any():
            return logits
        seeds, temperatures, top_ps = self._on_device
        slots = ctx.expanded_idx_mapping.long()
        # A row's input is at ``pos``, so the token sampled now is the sequence's token at ``pos + 1``.
        positions = ctx.pos.long() + 1 - self._states.prompt_len.gpu[slots]
        cut = bool((self._top_ps[ctx.idx_mapping_np] < 1).any())
        # Greedy rows keep their barred ids: vLLM handles those rows. The matrix is a copy that vLLM made for us.
        return apply(
            logits,
            seeds[slots],
            positions,
            temperatures[slots],
            top_ps[slots] if cut else None,
            self._barred,
            overwrite=True,
        )

    def _sent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns on the device, by asynchronous copies.

        From page-locked memory, fresh each time: torch reuses it only when the copy from it is complete.
        """
        device = self._states.device
        columns = [torch.from_numpy(column) for column in (self._seeds, self._temperatures, self._top_ps)]
        if device.type == "cuda":
            seeds, temperatures, top_ps = (column.pin_memory().to(device, non_blocking=True) for column in columns)
        else:
            seeds, temperatures, top_ps = (column.clone().to(device) for column in columns)
        return seeds, temperatures, top_ps
