"""Sharing prefixes, padding and leaving the batch early must change nothing: the slow twin decides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from capipe.models.engines.base import (
    ChoiceRequest,
    Completion,
    Engine,
    EngineDead,
    GenerationRequest,
    ImageInput,
    Prompt,
    RequestError,
    Sampling,
)
from capipe.models.engines.hf.batched_lm import BatchedLM, NextLogits
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.sampling import vision_ids

from ..conftest import DETAILED, MODEL, PLAIN

pytestmark = pytest.mark.asyncio(loop_scope="session")


def mixed(pictures: Sequence[ImageInput]) -> list[GenerationRequest]:
    """Greedy and sampled, full and cut support, several prompts and samples per image, one without an image."""
    requests = []
    for index, image in enumerate(pictures[:5]):
        for prompt in (Prompt(PLAIN, image), Prompt(DETAILED, image, answer_prefix="The image")):
            sampling = Sampling([0.0, 1.0, 0.7][index % 3], [1.0, 0.8][index % 2], 6 + 9 * (index % 2), seed=index)
            requests.append(GenerationRequest(prompt, sampling, logprobs=True, tempered=index % 2 == 1))
    requests += [GenerationRequest(Prompt(PLAIN, pictures[0]), Sampling(1.0, 1.0, 12, seed)) for seed in range(4)]
    requests.append(GenerationRequest(Prompt("A text.", system="Answer."), Sampling(max_tokens=8), logprobs=True))
    return requests


async def test_batches_equal_the_slow_twin(reference: TransformersEngine, pictures: list[ImageInput]) -> None:
    requests = mixed(pictures)
    fast = await asyncio.gather(*map(reference.generate, requests))
    for request, completion in zip(requests, fast, strict=True):
        slow = await reference.generate_reference(request)
        assert completion.token_ids == slow.token_ids
        assert (completion.text, completion.finish_reason) == (slow.text, slow.finish_reason)
        assert (completion.prompt_tokens, completion.image_tokens) == (slow.prompt_tokens, slow.image_tokens)
        assert (completion.logprobs is None) == (not request.logprobs)
        if completion.logprobs is not None:
            assert completion.logprobs == pytest.approx(slow.logprobs, abs=1e-4)


async def test_a_prompts_tokens_are_counted_with_those_of_its_image(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    """Whole, though the image was computed for another request; the text's own are as many with and without it."""
    alone, other = Prompt(PLAIN, pictures[0]), Prompt(DETAILED, pictures[0])
    answers = await asyncio.gather(
        *(reference.generate(GenerationRequest(prompt, Sampling(max_tokens=2))) for prompt in (alone, other)),
        reference.choose(ChoiceRequest(alone, ("A", "B"))),
        reference.choose(ChoiceRequest(Prompt(PLAIN), ("A", "B"))),
    )
    first, second, chosen, blind = answers
    for answer, prompt in ((first, alone), (second, other), (chosen, alone)):
        ids = reference.lm.prepare(prompt).ids.tolist()
        assert answer.prompt_tokens == len(ids) > (answer.image_tokens or 0) > 0
    assert first.image_tokens == second.image_tokens == chosen.image_tokens and blind.image_tokens == 0
    assert blind.prompt_tokens is not None and first.prompt_tokens is not None and first.image_tokens is not None
    # Two tokens stand around the image's own.
    assert first.prompt_tokens - first.image_tokens - blind.prompt_tokens == 2


async def test_log_probabilities_are_of_the_model_or_of_what_was_sampled_from(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    """Of the first token, from the prompt's logits: all ids but the barred, their temperature, the nucleus."""
    lm, prompt = reference.lm, Prompt(PLAIN, pictures[0])
    logits = lm.prefill([lm.prepare(prompt)]).logits[0].clone()
    barred = vision_ids(lm._model.config)
    logits[barred] = -torch.inf
    sampled = [Sampling(1.7, top_p, 1, seed) for top_p in (1.0, 0.6) for seed in range(8)]
    for tempered in (False, True):
        for sampling in sampled:
            found = await reference.generate(GenerationRequest(prompt, sampling, True, tempered))
            assert found.logprobs is not None
            chances = (logits / 1.7).softmax(0) if tempered else logits.softmax(0)
            if tempered and sampling.top_p < 1:
                order = chances.argsort(descending=True)
                kept = order[: int((chances[order].cumsum(0) < sampling.top_p).sum()) + 1]
                chances = chances / chances[kept].sum()
            assert found.logprobs[0] == pytest.approx(float(chances[found.token_ids[0]].log()), abs=1e-4)


async def test_each_distinct_prompt_and_image_is_computed_once(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[int] = []
    seen: list[int] = []
    prefill, look = reference.lm.prefill, reference.lm.family.body.get_image_features

    def counted_prefill(prompts: Sequence[PreparedPrompt]) -> Any:
        prefilled.append(len(prompts))
        return prefill(prompts)

    def counted_look(patches: torch.Tensor, grids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(len(grids))
        return look(patches, grids, **kwargs)

    monkeypatch.setattr(reference.lm, "prefill", counted_prefill)
    monkeypatch.setattr(reference.lm.family.body, "get_image_features", counted_look)
    prompts = [Prompt(text, image) for image in pictures[:2] for text in (PLAIN, DETAILED)]
    requests = [GenerationRequest(each, Sampling(1.0, 1.0, 3, seed)) for each in prompts for seed in range(4)]
    await asyncio.gather(*map(reference.generate, requests))
    assert (prefilled, seen) == ([4], [2])


async def test_whoever_ends_first_is_answered_first(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward may begin while the rest of the batch still draws: here the rest waits for the first answer."""
    answered, following, waited = threading.Event(), NextLogits.__call__, []

    def held(logits: NextLogits, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) == 1:
            waited.append(answered.wait(timeout=60))
        return following(logits, tokens)

    monkeypatch.setattr(NextLogits, "__call__", held)
    prompt = Prompt(PLAIN, pictures[0])
    rest = asyncio.create_task(reference.generate(GenerationRequest(prompt, Sampling(max_tokens=4))))
    first = await reference.generate(GenerationRequest(prompt, Sampling(max_tokens=2)))
    answered.set()
    assert first.n_tokens == 2 and (await rest).n_tokens == 4
    assert waited and all(waited)


async def test_what_stands_for_pixels_is_never_drawn(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand tokens of a model that wants nothing else: drawn, they would ask for pixels that are not there."""
    barred = vision_ids(reference.lm._model.config)
    assert reference.lm._model.config.image_token_id in barred

    def eager(made: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*arguments: Any, **vision: Any) -> torch.Tensor:
            logits = made(*arguments, **vision)
            logits[:, barred] = logits.max() + 50
            return logits

        return make

    monkeypatch.setattr(BatchedLM, "forward", eager(BatchedLM.forward))
    monkeypatch.setattr(NextLogits, "__call__", eager(NextLogits.__call__))
    request = [GenerationRequest(Prompt(PLAIN, pictures[0]), Sampling(1.0, 1.0, 40, seed), True) for seed in range(120)]
    drawn = await asyncio.gather(*map(reference.generate, request))
    tokens = [token for each in drawn for token in each.token_ids]
    assert len(tokens) >= 1000 and not set(tokens) & set(barred)
    greedy = await reference.generate(GenerationRequest(Prompt(PLAIN, pictures[0]), Sampling(max_tokens=20)))
    assert not set(greedy.token_ids) & set(barred)


async def test_the_end_of_turn_token_is_reported(reference: TransformersEngine, pictures: list[ImageInput]) -> None:
    request = GenerationRequest(Prompt(PLAIN, pictures[0]), Sampling(max_tokens=200))
    whole = await reference.generate(request)
    assert whole.finish_reason == "stop"
    assert whole.n_tokens == len(whole.token_ids)
    assert "<|" not in whole.text
    cut = await reference.generate(GenerationRequest(request.prompt, Sampling(max_tokens=whole.n_tokens - 1)))
    assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:-1])


async def test_a_given_captions_ids_are_those_that_the_model_writes(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [GenerationRequest(Prompt(PLAIN, image), Sampling(max_tokens=80)) for image in pictures[:4]]
    for written in await asyncio.gather(*map(reference.generate, requests)):
        assert written.finish_reason == "stop" and reference.lm.caption_ids(written.text) == list(written.token_ids)
    own = reference.lm.encoder.end_id
    assert own is not None
    monkeypatch.setattr(reference.lm, "_end_ids", frozenset({own, own - 1}))
    assert reference.lm.caption_ids("A star.")[-1] == own  # of several ends the tokenizer's
    monkeypatch.setattr(reference.lm, "_end_ids", frozenset({40, 41}))
    assert reference.lm.caption_ids("A star.")[-1] == 40  # where the model does not end at it, one at which it does


async def test_choices_are_read_from_the_whole_distribution(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    prompt = Prompt(PLAIN, pictures[1])
    first = await reference.generate(GenerationRequest(prompt, Sampling(max_tokens=1), logprobs=True))
    others = [each for each in ("a", "b", "c") if each != first.text]
    scores = await reference.choose(ChoiceRequest(prompt, (others[0], first.text, others[1])))
    assert first.logprobs is not None
    assert scores.best == 1
    assert scores.logprobs[1] == pytest.approx(first.logprobs[0], abs=1e-4)


async def test_a_schema_is_ignored(reference: TransformersEngine, pictures: list[ImageInput]) -> None:
    prompt, sampling = Prompt(PLAIN, pictures[0]), Sampling(max_tokens=8)
    assert not reference.guides
    guided = await reference.generate(GenerationRequest(prompt, sampling, json_schema='{"type": "object"}'))
    assert guided == await reference.generate(GenerationRequest(prompt, sampling))


BAD_REQUESTS = [
    (GenerationRequest(Prompt(PLAIN, ImageInput("none"))), "has no pixels"),
    (GenerationRequest(Prompt(PLAIN, ImageInput("grey", np.zeros((28, 28, 1), np.uint8)))), "not uint8"),
    (GenerationRequest(Prompt(PLAIN, ImageInput("thin", np.zeros((2, 600, 3), np.uint8)))), "aspect ratio"),
    (GenerationRequest(Prompt("word " * 600)), "tokens"),
    (ChoiceRequest(Prompt("Which?"), ("A", "two words")), "'two words'"),
]


async def bad_requests_fail_alone(engine: Engine, picture: ImageInput) -> None:
    good = GenerationRequest(Prompt(PLAIN, picture), Sampling(max_tokens=4))
    alone = await engine.generate(good)
    ask = [
        engine.choose(each) if isinstance(each, ChoiceRequest) else engine.generate(each) for each, _ in BAD_REQUESTS
    ]
    *errors, after = await asyncio.gather(*ask, engine.generate(good), return_exceptions=True)
    for error, (_, reason) in zip(errors, BAD_REQUESTS, strict=True):
        assert isinstance(error, RequestError), error
        assert reason in str(error)
    assert after == alone


async def test_bad_requests_fail_alone(reference: TransformersEngine, pictures: list[ImageInput]) -> None:
    await bad_requests_fail_alone(reference, pictures[0])


async def test_a_text_that_spells_the_image_is_read_as_text(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    image_token = reference.lm._model.config.image_token_id
    spelled, split = (
        [Prompt(f"an {text} in the text", image) for image in (None, pictures[0])]
        for text in ("<|image_pad|><|im_end|>", "< |image_pad|>< |im_end|>")
    )
    requests = [GenerationRequest(prompt, Sampling(max_tokens=4)) for prompt in (*spelled, *split)]
    one, other, same_as_one, same_as_other = await asyncio.gather(*map(reference.generate, requests))
    assert one == same_as_one and other == same_as_other
    assert [reference.lm.encoder.encode(prompt).count(image_token) for prompt in spelled] == [0, 1]
    assert other == await reference.generate_reference(requests[1])


async def test_a_batch_that_does_not_fit_is_halved(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    prefill = reference.lm.prefill

    def cramped(prompts: Sequence[PreparedPrompt]) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return prefill(prompts)

    monkeypatch.setattr(reference.lm, "prefill", cramped)
    requests = [GenerationRequest(Prompt(PLAIN, each), Sampling(max_tokens=4)) for each in pictures[:6]]
    completions = await asyncio.gather(*map(reference.generate, requests))
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    monkeypatch.undo()
    assert completions == await asyncio.gather(*map(reference.generate, requests))


async def test_the_request_that_breaks_the_model_fails_alone(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = reference.lm.prefill

    def poisoned(prompts: Sequence[PreparedPrompt]) -> Any:
        if any(each.image is not None and each.image.uid == pictures[1].uid for each in prompts):
            raise RuntimeError("poison")
        return prefill(prompts)

    monkeypatch.setattr(reference.lm, "prefill", poisoned)
    requests = [GenerationRequest(Prompt(PLAIN, each), Sampling(max_tokens=4)) for each in pictures[:3]]
    outcomes = await asyncio.gather(*map(reference.generate, requests), return_exceptions=True)
    assert [type(each) for each in outcomes] == [Completion, RequestError, Completion]
    assert "poison" in str(outcomes[1])


async def test_a_faulted_device_and_closing_end_the_engine(
    pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await load_engine(EngineConfig("transformers", MODEL, device="cpu"))
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine, Engine)

    def faulted(prompts: Sequence[PreparedPrompt]) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine.lm, "prefill", faulted)
    requests = [GenerationRequest(Prompt(PLAIN, each)) for each in pictures[:3]]
    outcomes = await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
    assert all(isinstance(each, EngineDead) for each in outcomes)
    await engine.aclose()
    with pytest.raises(EngineDead, match="illegal memory"):
        await engine.generate(requests[0])


async def test_closing_answers_those_who_wait(pictures: list[ImageInput]) -> None:
    engine = await load_engine(EngineConfig("transformers", MODEL, device="cpu", concurrency=1))
    requests = [GenerationRequest(Prompt(PLAIN, each), Sampling(max_tokens=4)) for each in pictures[:4]]
    tasks = [asyncio.create_task(engine.generate(each)) for each in requests]
    await asyncio.sleep(0.01)
    await engine.aclose()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert sum(isinstance(each, EngineDead) for each in outcomes) >= 3


async def test_sampling_refuses_what_no_engine_can_do() -> None:
    for wrong in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]


async def test_the_latest_batch_gives_away_what_it_prepared(
    reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    """A trainer scores captions after the very prompts that they were sampled from: one preparation does for both."""
    prompt, same = (Prompt(PLAIN, pictures[0]) for _ in range(2))
    await reference.generate(GenerationRequest(prompt, Sampling(max_tokens=2)))
    assert reference.prepared(prompt) is None  # nothing outlives its batch, unless asked for
    engine = TransformersEngine(reference.lm, reference.grid, 8, keep_prepared=True)
    try:
        await engine.generate(GenerationRequest(prompt, Sampling(max_tokens=2)))
        known, fresh = engine.prepared(prompt), reference.lm.prepare(prompt)
        assert known is not None and engine.prepared(same) is None
        assert known.image is not None and fresh.image is not None
        assert torch.equal(known.ids, fresh.ids) and torch.equal(known.positions, fresh.positions)
        assert torch.equal(known.image.patches, fresh.image.patches) and known.next_position == fresh.next_position
        await engine.generate(GenerationRequest(same, Sampling(max_tokens=2)))
        assert engine.prepared(prompt) is None
    finally:
        await engine.aclose()
