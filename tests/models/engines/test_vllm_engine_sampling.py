"""The processors' bookkeeping against vLLM's own batch: adds, removals, moves, swaps, preemption."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from capipe.models.engines.base import GenerationRequest, Prompt, Rejected, Sampling
from capipe.models.engines.sampling import apply, penalise_
from capipe.models.engines.vllm.engine import VLLMEngine
from capipe.models.engines.vllm.sampling import FirstRunnerGumbel, SecondRunnerGumbel, extra_args, parameters

CPU = torch.device("cpu")
VOCAB, IMAGE = 50, 20
CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(image_token_id=IMAGE)))


def params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(temperature=0.0, extra_args=extra_args(sampling))


def expected(logits: torch.Tensor, rows: list[tuple[Sampling, int]]) -> torch.Tensor:
    """What a batch of (sampling, tokens drawn so far) must come out as, each row computed alone.

    Rows that sample have no chance of the image's token; greedy ones are vLLM's own business.
    """
    outcome = []
    for row, (sampling, drawn) in zip(logits, rows, strict=True):
        seed, position = torch.tensor([sampling.seed]), torch.tensor([drawn])
        top_p = torch.tensor([sampling.top_p]) if sampling.top_p < 1 else None
        barred = torch.tensor([] if sampling.temperature == 0 else [IMAGE], dtype=torch.long)
        outcome.append(
            apply(
                row[None].index_fill(1, barred, -torch.inf), seed, position, torch.tensor([sampling.temperature]), top_p
            )
        )
    return torch.cat(outcome)


async def test_log_probabilities_are_among_the_ids_that_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reports those of all ids, before ours bars any: their share is asked for and goes to the others."""
    encoder: Any = SimpleNamespace(answer=lambda ids: ("", None))
    engine = VLLMEngine(None, encoder, None, 1, [], set(), True, 100, [IMAGE, IMAGE + 1])  # type: ignore[arg-type]
    asked: list[SamplingParams] = []
    shares = {3: 0.3, IMAGE: 0.25, IMAGE + 1: 0.15}

    async def run(prompt: Prompt, params: SamplingParams) -> Any:
        asked.append(params)
        listed = [3, *(params.logprob_token_ids or [])]
        step = {token: SimpleNamespace(logprob=math.log(shares[token])) for token in listed}
        return SimpleNamespace(token_ids=[3, 3], logprobs=[step, step], finish_reason="length"), (5, 0)

    monkeypatch.setattr(engine, "_run", run)
    request = GenerationRequest(Prompt("Describe."), Sampling(1.0), logprobs=True, tempered=True)
    drawn = await engine.generate(request)
    assert drawn.logprobs == pytest.approx([math.log(0.3 / 0.6)] * 2) and drawn.prompt_tokens == 5
    assert asked[0].logprob_token_ids == [IMAGE, IMAGE + 1] and asked[0].logprobs is None
    greedy = await engine.generate(GenerationRequest(Prompt("Describe."), logprobs=True))  # vLLM's own: bars nothing
    assert greedy.logprobs == pytest.approx([math.log(0.3)] * 2) and asked[1].logprob_token_ids is None
    with pytest.raises(Rejected, match="untempered model only"):
        await engine.generate(replace(request, sampling=Sampling(0.7)))


def first_runner() -> FirstRunnerGumbel:
    return FirstRunnerGumbel(CONFIG, CPU, False)


def test_greedy_requests_carry_nothing_and_cost_nothing() -> None:
    assert extra_args(Sampling()) is None
    processor = first_runner()
    processor.update_state(BatchUpdate(1, [], [(0, params(Sampling()), [1], [])], []))
    logits = torch.randn(1, VOCAB)
    assert processor.apply(logits) is logits
    assert not processor.is_argmax_invariant()


def test_first_runner_follows_a_random_history_of_the_batch() -> None:
    rng, processor = random.Random(4), first_runner()
    batch: list[tuple[Sampling, list[int]]] = []
    for step in range(300):
        removed, added, moved = [], [], []
        # As vLLM does it: finished rows leave holes, new requests fill them or the end, the last rows fill the rest.
        holes = sorted(index for index in range(len(batch)) if rng.random() < 0.15)
        size = len(batch)
        for _ in range(rng.choice([0, 0, 1, 3])):
            temperature = rng.choice([0.0, 0.6, 1.0])
            request = (Sampling(temperature, rng.choice([1.0, 0.7]), 9, rng.randrange(1 << 40)), [7] * rng.randrange(3))
            index = holes.pop(0) if holes else size
            size = max(size, index + 1)
            batch[index : index + 1] = [request]
            added.append((index, params(request[0]), [1], request[1]))
        while holes:
            hole = holes.pop()
            removed.append(hole)
            last = size - 1
            if hole != last:
                moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
                batch[hole] = batch[last]
            batch.pop()
            size -= 1
        if size > 1 and rng.random() < 0.3:
            one, other = rng.sample(range(size), 2)
            moved.append((one, other, MoveDirectionality.SWAP))
            batch[one], batch[other] = batch[other], batch[one]
        changed = bool(removed or added or moved)
        processor.update_state(BatchUpdate(size, removed, added, moved) if changed else None)
        if batch:
            logits = torch.randn(size, VOCAB, generator=torch.Generator().manual_seed(step))
            wanted = expected(logits, [(sampling, len(drawn)) for sampling, drawn in batch])
            assert torch.equal(processor.apply(logits.clone()), wanted), step
        for _, drawn in batch:
            drawn.append(step)


def second_runner(*prompt_lengths: int) -> SecondRunnerGumbel:
    states: Any = SimpleNamespace(
        device=CPU,
        max_num_reqs=len(prompt_lengths),
        vocab_size=VOCAB,
        prompt_len=SimpleNamespace(gpu=torch.tensor(prompt_lengths)),
    )
    return SecondRunnerGumbel(CONFIG, states)


def test_second_runner_reads_slots_and_positions() -> None:
    slots = [Sampling(1.0, 1.0, 9, 3), Sampling(), Sampling(0.5, 0.8, 9, 4)]
    prompt_lengths, drawn = [5, 6, 7], [0, 2, 11]
    processor = second_runner(*prompt_lengths, 0)
    modifies = [processor.add_request(slot, params(sampling)) for slot, sampling in enumerate(slots)]
    assert modifies == [True, False, True]
    processor.apply_staged_writes()
    order = [2, 0, 1]
    logits = torch.randn(3, VOCAB)

    def context(rows: list[int]) -> Any:
        return SimpleNamespace(
            expanded_idx_mapping=torch.tensor(rows, dtype=torch.int32),
            idx_mapping_np=np.array(rows),
            pos=torch.tensor([prompt_lengths[slot] + drawn[slot] - 1 for slot in rows]),
        )

    wanted = expected(logits, [(slots[slot], drawn[slot]) for slot in order])
    assert torch.equal(processor.apply(logits, context(order)), wanted)
    assert processor.apply(logits[:1], context([1])) is not None
    assert torch.equal(processor.apply(logits[:1], context([1])), logits[:1])
    processor.add_request(2, params(Sampling()))  # the slot is used again, by a greedy request
    processor.apply_staged_writes()
    assert torch.equal(processor.apply(logits[:1], context([2])), logits[:1])


def test_second_runner_sends_only_what_changed() -> None:
    processor = second_runner(5, 6)
    sampled, greedy = params(Sampling(0.7, 0.9, 9, 3)), params(Sampling())

    def sends(slot: int, request: SamplingParams) -> bool:
        before = processor._on_device
        processor.add_request(slot, request)
        processor.apply_staged_writes()
        return processor._on_device is not before

    assert [sends(0, greedy), sends(1, greedy)] == [False, False]  # as it began
    assert [sends(0, sampled), sends(0, sampled)] == [True, False]
    assert sends(0, params(Sampling(0.7, 0.9, 9, 4)))
    assert [sends(0, greedy), sends(0, greedy)] == [True, False]
    seeds, temperatures, top_ps = processor._on_device
    assert (seeds.tolist(), temperatures.tolist(), top_ps.tolist()) == ([0, 0], [0.0, 0.0], [1.0, 1.0])


def test_what_was_sent_stays_as_it_was_sent() -> None:
    processor = second_runner(5)
    processor.add_request(0, params(Sampling(0.7, 0.9, 9, 3)))
    processor.apply_staged_writes()
    in_use = processor._on_device
    processor.add_request(0, params(Sampling(0.4, 1.0, 9, 8)))  # while the device may still be reading
    assert [column.item() for column in in_use] == [3, pytest.approx(0.7), pytest.approx(0.9)]


def test_a_penalty_scales_logits_and_not_the_noise() -> None:
    """The first runner's penalties come after its processors, so a sampling request carries its own there."""
    sampling = Sampling(0.7, 1.0, 9, 5, repetition_penalty=1.5, min_tokens=2)
    ours, theirs = parameters(sampling, False), parameters(sampling, True)
    assert (ours["repetition_penalty"], theirs["repetition_penalty"]) == (1.0, 1.5)
    assert ours["min_tokens"] == theirs["min_tokens"] == 2
    assert parameters(Sampling(repetition_penalty=1.5), False)["repetition_penalty"] == 1.5  # greedy: no noise
    processor, plain, logits = first_runner(), Sampling(1.0, 1.0, 9, 8), torch.randn(3, VOCAB)
    rows = [(Sampling(), []), (sampling, [7, 3]), (plain, [1])]
    added = [(at, SamplingParams(**parameters(one, False)), [2, 7, 7], drawn) for at, (one, drawn) in enumerate(rows)]
    processor.update_state(BatchUpdate(3, [], added, []))
    penalised = logits.clone()
    penalise_(penalised[1:2], torch.tensor([[2, 3, 7]]), torch.tensor([1.5]))
    wanted = expected(penalised, [(one, len(drawn)) for one, drawn in rows])
    assert torch.equal(processor.apply(logits.clone()), wanted)
    assert not torch.equal(penalised, logits)
