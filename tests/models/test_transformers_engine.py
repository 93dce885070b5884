"""Sharing prefixes, padding and leaving the batch early must change nothing: the slow twin decides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from capipe.models.batched_lm import BatchedLM, PreparedPrompt, Row, vision_ids
from capipe.models.engine import (
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
from capipe.models.loading import EngineConfig, load_engine, resolve_model
from capipe.models.prefix_tree import Segment
from capipe.models.prompting import PromptEncoder
from capipe.models.quiz import Question, caption_prompt, image_prompt, put, rotations
from capipe.models.transformers_engine import TransformersEngine

from .conftest import DETAILED, MODEL, PLAIN

pytestmark = pytest.mark.asyncio(loop_scope="session")


def mixed(pictures: Sequence[ImageInput]) -> list[GenerationRequest]:
    """Greedy and sampled, full and cut support, several prompts and samples per image, one without an image."""
    requests = []
    for index, image in enumerate(pictures[:5]):
        for prompt in (Prompt(PLAIN, image), Prompt(DETAILED, image, answer_prefix="The image")):
            sampling = Sampling([0.0, 1.0, 0.7][index % 3], [1.0, 0.8][index % 2], 6 + 9 * (index % 2), seed=index)
            requests.append(GenerationRequest(prompt, sampling, logprobs=True))
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
        assert (completion.logprobs is None) == (not request.logprobs)
        if completion.logprobs is not None:
            assert completion.logprobs == pytest.approx(slow.logprobs, abs=1e-4)


async def test_each_distinct_prompt_and_image_is_computed_once(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[int] = []
    seen: list[int] = []
    prefill, look = reference.lm.prefill, reference.lm._base.get_image_features

    def counted_prefill(prompts: Sequence[PreparedPrompt]) -> Any:
        prefilled.append(len(prompts))
        return prefill(prompts)

    def counted_look(patches: torch.Tensor, grids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(len(grids))
        return look(patches, grids, **kwargs)

    monkeypatch.setattr(reference.lm, "prefill", counted_prefill)
    monkeypatch.setattr(reference.lm._base, "get_image_features", counted_look)
    prompts = [Prompt(text, image) for image in pictures[:2] for text in (PLAIN, DETAILED)]
    requests = [GenerationRequest(each, Sampling(1.0, 1.0, 3, seed)) for each in prompts for seed in range(4)]
    await asyncio.gather(*map(reference.generate, requests))
    assert (prefilled, seen) == ([4], [2])


async def test_whoever_ends_first_is_answered_first(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward may begin while the rest of the batch still draws: here the rest waits for the first answer."""
    answered, forward, waited = threading.Event(), BatchedLM._forward, []

    def held(lm: BatchedLM, ids: torch.Tensor, *rest: Any, **vision: Any) -> torch.Tensor:
        if tuple(ids.shape) == (1, 1):
            waited.append(answered.wait(timeout=60))
        return forward(lm, ids, *rest, **vision)

    monkeypatch.setattr(BatchedLM, "_forward", held)
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
    barred, forward = vision_ids(reference.lm._model.config), BatchedLM._forward
    assert reference.lm._model.config.image_token_id in barred

    def eager(lm: BatchedLM, *arguments: Any, **vision: Any) -> torch.Tensor:
        logits = forward(lm, *arguments, **vision)
        logits[:, barred] = logits.max() + 50
        return logits

    monkeypatch.setattr(BatchedLM, "_forward", eager)
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


QUESTIONS = [
    Question("What colour is the star?", ("red", "blue", "green"), 1),
    Question("Where is the small circle?", ("in the middle", "at the top left", "nowhere"), 0),
    Question("How many shapes are there on the background that you see?", ("one", "two"), 0),
    Question("Sign?", ("STOP", "SALE", "OPEN", "GYM"), 2),
]
CAPTIONS = ("A red star. " * 12, "A small blue circle in the middle and a sign that reads STOP. " * 6, None)


def quiz(beginning: str, image: ImageInput | None = None) -> list[Prompt]:
    return [
        Prompt(beginning + put(question, order), image)
        for question in QUESTIONS
        for order in rotations(len(question.options) + 1, 4)
    ]


def small_qwen2(**changes: Any) -> BatchedLM:
    """A text-only model with random weights and the captioner's words; not so small that all tokens are alike."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=600, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, **sizes, **changes
    )
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    return BatchedLM(
        Qwen2ForCausalLM(config).eval(), None, PromptEncoder(tokenizer, None), frozenset({tokenizer.eos_token_id}), 2048
    )


def passes(lm: BatchedLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ids' shapes that went through the model since."""
    shapes: list[tuple[int, ...]] = []
    forward = lm._forward

    def counted(ids: torch.Tensor, *args: Any, **vision: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, *args, **vision)

    monkeypatch.setattr(lm, "_forward", counted)
    return shapes


def both_ways(lm: BatchedLM, prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """Check that sharing changes neither what follows the prompts nor what is drawn; the passes of both prefills."""
    images: dict[str, Any] = {}
    prepared = [lm.prepare(each, images) for each in prompts]
    rows = [Row(index, Sampling(index % 2, 1.0, 5, seed=index), True) for index in range(len(prompts))]
    logits, drawn, shapes = [], [], []
    for share in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(lm, "share_prefixes", share)
            seen = passes(lm, patch)
            prefix = lm.prefill(prepared)
        logits.append(prefix.logits.log_softmax(dim=-1))
        shapes.append(seen)
        assert prefix.mask.sum(dim=1).tolist() == prefix.lengths == [len(each.ids) for each in prepared]
        drawn.append(lm.decode(prefix, rows))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
    assert torch.equal(logits[0].argmax(dim=-1), logits[1].argmax(dim=-1))
    for one, other in zip(*drawn, strict=True):
        assert (one.token_ids, one.stopped) == (other.token_ids, other.stopped)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    return shapes


async def test_shared_captions_and_questions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small_qwen2()
    for captions in (CAPTIONS[:1], CAPTIONS[:2], CAPTIONS):
        prompts = [each for caption in captions for each in quiz(caption_prompt(caption))]
        prompts = [*prompts[1::2], Prompt("Something else."), *prompts[::2], Prompt("word " * 150, system="Be brief.")]
        shared, unshared = both_ways(lm, prompts, monkeypatch)
        assert len(unshared) == 1 < len(shared)
        assert sum(rows * width for rows, width in shared) < sum(rows * width for rows, width in unshared) / 2
        assert shared[-1][0] == len(prompts)


async def test_shared_images_change_nothing(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = quiz(image_prompt(), pictures[0])
    shared, unshared = both_ways(reference.lm, one, monkeypatch)
    assert len(unshared) == 1 < len(shared)
    two = quiz(image_prompt(), pictures[1])
    text = quiz(caption_prompt(CAPTIONS[0]))[:3]
    several = [Prompt(PLAIN, each) for each in pictures[2:5]]  # each of them seen once: in the last level alone
    mixed = [prompt for pair in zip(one, two, strict=True) for prompt in pair] + text + several
    shared, unshared = both_ways(reference.lm, mixed, monkeypatch)
    assert len(unshared) == 1 < len(shared)


async def test_a_cut_may_lie_inside_of_an_image(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = reference.lm
    prompts = [lm.prepare(Prompt(text, image)) for image in pictures[:2] for text in (PLAIN, DETAILED)]
    assert all(prompt.ids[9] == prompt.ids[10] == lm._model.config.image_token_id for prompt in prompts)
    whole = lm.prefill(prompts)
    beginnings = [Segment(0, 0, 10, None), Segment(2, 0, 10, None)]
    ends = [Segment(row, 10, len(prompt.ids), row // 2) for row, prompt in enumerate(prompts)]
    monkeypatch.setattr(lm, "_plan", lambda prompts: [beginnings, ends])
    torch.testing.assert_close(lm.prefill(prompts).logits, whole.logits, atol=1e-4, rtol=0)


async def test_sliding_windows_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding between a caption and its questions would push the caption out of the window."""
    lm = small_qwen2(use_sliding_window=True, sliding_window=48, max_window_layers=1)
    prompts = [each for caption in CAPTIONS for each in quiz(caption_prompt(caption))]
    shared, _ = both_ways(lm, prompts, monkeypatch)
    assert len(shared) == 1


async def test_choices_of_a_quiz_share_a_larger_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small_qwen2()
    engine = TransformersEngine(lm, None, concurrency=8)
    sizes: list[int] = []
    prefill = lm.prefill

    def counted(prompts: Sequence[PreparedPrompt]) -> Any:
        sizes.append(len(prompts))
        return prefill(prompts)

    monkeypatch.setattr(lm, "prefill", counted)
    prompts = [each for caption in CAPTIONS[:2] for each in quiz(caption_prompt(caption))][:20]
    requests = [ChoiceRequest(prompt, ("A", "B", "C")) for prompt in prompts]
    together = await asyncio.gather(*map(engine.choose, requests))
    alone = [await engine.choose(each) for each in requests[:3]]
    texts = [GenerationRequest(prompt, Sampling(max_tokens=2)) for prompt in prompts]
    await asyncio.gather(*map(engine.generate, texts))
    assert sizes == [16, 4, 1, 1, 1, 8, 8, 4]
    for one, other in zip(together, alone, strict=False):
        assert (one.best, one.logprobs) == (other.best, pytest.approx(other.logprobs, abs=1e-4))
    await engine.aclose()


async def test_an_image_is_preprocessed_once_for_its_prompts(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    process = reference.lm._image_processor

    def counted(**kwargs: Any) -> Any:
        made.append(kwargs["images"])
        return process(**kwargs)  # type: ignore[misc]

    monkeypatch.setattr(reference.lm, "_image_processor", counted)
    prompts = [*quiz(image_prompt(), pictures[0])[:6], *quiz(image_prompt(), pictures[1])[:6]]
    await asyncio.gather(*(reference.choose(ChoiceRequest(prompt, ("A", "B"))) for prompt in prompts))
    assert len(made) == 2


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
    (GenerationRequest(Prompt("an <|image_pad|> in the text")), "placeholder"),
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
