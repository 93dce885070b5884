"""Beams, banned n-grams, least lengths and penalties: in a batch as in transformers' own loop, one prompt at a time."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from capipe.models.engines.base import Completion, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.beam_search import BeamSearch
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.hf.logits_processors import LogitsProcessors
from capipe.models.engines.loading import EngineConfig, load_engine

from ..captioners import KINDS, write_captioner
from ..conftest import DETAILED, PLAIN
from .test_captioners import picture

pytestmark = pytest.mark.asyncio(loop_scope="session")

#: VLRM's evaluation, shorter; other widths and rules; rules without beams, greedy and sampled.
VLRM = Sampling(0.0, 1.0, 14, beams=5, no_repeat_ngram=2, min_tokens=4)
WAYS = [
    VLRM,
    Sampling(0.0, 1.0, 24, beams=3),
    Sampling(0.0, 1.0, 12, beams=5, min_tokens=7),
    Sampling(0.0, 1.0, 12, beams=2, no_repeat_ngram=3, repetition_penalty=1.3),
    Sampling(0.0, 1.0, 12, no_repeat_ngram=2, min_tokens=6),
    Sampling(0.0, 1.0, 12, repetition_penalty=1.4),
    Sampling(1.0, 1.0, 40, seed=3, no_repeat_ngram=1),
    Sampling(0.7, 0.9, 40, seed=4, repetition_penalty=1.2, min_tokens=5),
]


async def agree(engine: TransformersEngine, requests: list[GenerationRequest]) -> list[Completion]:
    """All answers of one call, each compared with that of transformers' loop."""
    fast = await asyncio.gather(*map(engine.generate, requests))
    for request, completion in zip(requests, fast, strict=True):
        slow = await engine.generate_reference(request)
        assert completion.token_ids == slow.token_ids, request.sampling
        assert (completion.text, completion.finish_reason) == (slow.text, slow.finish_reason)
        assert completion.logprobs == pytest.approx(slow.logprobs, abs=1e-4)
    return list(fast)


@pytest.mark.parametrize("kind", KINDS)
async def test_captioners_write_as_in_transformers(kind: str, tmp_path: Path) -> None:
    engine = await load_engine(EngineConfig("transformers", str(write_captioner(tmp_path / kind, kind)), device="cpu"))
    assert isinstance(engine, TransformersEngine)
    requests = [
        GenerationRequest(Prompt("", picture(index % 3)), sampling, logprobs=True)
        for index, sampling in enumerate(WAYS * 2)
    ]
    found = await agree(engine, requests)
    await engine.aclose()
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


async def test_a_chat_model_writes_as_in_transformers(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    texts = (PLAIN, DETAILED)
    requests = [
        GenerationRequest(Prompt(texts[index % 2], pictures[index % 5]), sampling, logprobs=True)
        for index, sampling in enumerate(WAYS)
    ]
    found = await agree(reference, requests)
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


async def test_no_pair_occurs_twice_and_no_caption_is_shorter(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    """Over prompt and caption, as transformers has it; without the rules this captioner breaks both."""
    requests = [GenerationRequest(Prompt(DETAILED, image), replace(VLRM, max_tokens=60)) for image in pictures[:6]]
    ruled = await asyncio.gather(*map(reference.generate, requests))
    free = await asyncio.gather(
        *(reference.generate(replace(request, sampling=Sampling(max_tokens=60))) for request in requests)
    )
    assert all(repeated_pairs(completion) == 0 for completion in ruled)
    assert any(repeated_pairs(completion) > 0 for completion in free)
    long = Sampling(max_tokens=40, min_tokens=40, beams=2)
    (longest,) = await asyncio.gather(reference.generate(replace(requests[0], sampling=long)))
    assert longest.n_tokens == 40 > min(completion.n_tokens or 0 for completion in free)


def repeated_pairs(completion: Completion) -> int:
    pairs = list(zip(completion.token_ids, completion.token_ids[1:], strict=False))
    return len(pairs) - len(set(pairs))


async def test_beams_find_what_is_likelier_than_the_greedy_text(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    """By the mean log-probability of a token, which the search maximises; equal where greedy is best already."""
    prompts = [Prompt(PLAIN, image) for image in pictures[:12]]

    async def means(beams: int) -> list[float]:
        sampling = Sampling(0.0, 1.0, 20, beams=beams)
        found = await asyncio.gather(
            *(reference.generate(GenerationRequest(prompt, sampling, logprobs=True)) for prompt in prompts)
        )
        return [sum(completion.logprobs or ()) / len(completion.token_ids) for completion in found]

    greedy, searched = await means(1), await means(4)
    assert sum(searched) > sum(greedy) + 0.1


async def test_processors_are_those_of_transformers() -> None:
    """Rows with unequal prompts and rules, after some tokens, against transformers' own on each row alone."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 9, (length,), generator=generator) for length in (3, 11, 7, 1)]
    ways = [
        Sampling(repetition_penalty=1.5, no_repeat_ngram=2),
        Sampling(no_repeat_ngram=3, min_tokens=9),
        Sampling(repetition_penalty=0.8, no_repeat_ngram=1, min_tokens=2),
        Sampling(),
    ]
    made = LogitsProcessors(ways, prompts, [1, 4], torch.device("cpu"))
    rows = list(prompts)
    for position in range(12):
        logits = torch.randn(len(ways), 12, generator=generator)
        before, processed = logits.clone(), made(logits, position)
        assert torch.equal(logits, before)  # the model's own are still needed
        for row, sampling, history, prompt, own in zip(logits, ways, rows, prompts, processed, strict=True):
            wanted = row[None]
            wanted = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(history[None], wanted)
            if sampling.no_repeat_ngram:
                wanted = NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram)(history[None], wanted)
            if sampling.min_tokens:
                least = MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, [1, 4])
                wanted = least(history[None], wanted)
            assert torch.equal(own, wanted[0])
        tokens = torch.randint(0, 9, (len(ways),), generator=generator)
        made.append(tokens)
        rows = [torch.cat([row, token[None]]) for row, token in zip(rows, tokens, strict=True)]


async def test_rows_may_repeat_and_change_places() -> None:
    ways = [Sampling(no_repeat_ngram=2), Sampling(repetition_penalty=2.0)]
    made = LogitsProcessors(ways, [torch.tensor([1, 2]), torch.tensor([3])], [0], torch.device("cpu"))
    made.select(torch.tensor([1, 0, 0]))
    made.append(torch.tensor([2, 1, 3]))
    processed = made(torch.ones(3, 5), 1)
    assert processed.tolist() == [[1, 1, 0.5, 0.5, 1], [1, 1, -math.inf, 1, 1], [1] * 5]


async def test_a_search_by_hand() -> None:
    """Two beams, end 0: the likelier first token leads nowhere, the other one to the best mean."""
    search = BeamSearch([3], 2, frozenset({0}))
    first = torch.tensor([[0.1, 0.5, 0.4, 0.0]]).log()
    step = search.advance(first, first)
    assert (step.rows.tolist(), step.tokens.tolist(), step.done) == ([0, 0], [1, 2], [])
    second = torch.tensor([[0.2, 0.3, 0.3, 0.2], [0.9, 0.1, 0.0, 0.0]]).log()
    step = search.advance(second, second)  # [2, 0] is finished at log 0.36 / 2; [1, 1] and [1, 2] go on at log 0.15
    assert step.tokens.tolist() == [1, 2] and step.rows.tolist() == [0, 0]
    third = torch.full((2, 4), 0.25).log()
    step = search.advance(third, third)
    assert step.done == [0] and not len(step.rows)
    best = search.beams[0].finished[0]
    assert [node.token for node in best.last.path()] == [2, 0] and best.stopped
    assert best.score == pytest.approx(math.log(0.36) / 2)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"beams": 2, "temperature": 0.5}, "set temperature to 0"),
        ({"beams": 0}, "beams"),
        ({"min_tokens": 300}, "min_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
async def test_numbers_that_nothing_can_decode_with(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Sampling(**wrong)  # type: ignore[arg-type]
