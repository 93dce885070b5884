"""Computing the beginnings that prompts share once must change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from capipe.models.engines.base import ChoiceRequest, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.batched_lm import BatchedLM, SequenceRow
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.hf.model_adapter import PreparedPrompt
from capipe.models.engines.hf.prefix_tree import Segment
from capipe.models.engines.model_folder import resolve_model
from capipe.models.engines.prompting import PromptEncoder
from capipe.models.quiz import Question, caption_prompt, image_prompt, put, rotations
from capipe.models.yes_no import ORDERS, YesNoConfig, YesNoReader, prompt_of, sigmoid

from ..conftest import DETAILED, MODEL, PLAIN

pytestmark = pytest.mark.asyncio(loop_scope="session")

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
    forward = lm.forward

    def counted(ids: torch.Tensor, *args: Any, **vision: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, *args, **vision)

    monkeypatch.setattr(lm, "forward", counted)
    return shapes


def both_ways(lm: BatchedLM, prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """Check that sharing changes neither what follows the prompts nor what is drawn; the passes of both prefills."""
    images: dict[str, Any] = {}
    prepared = [lm.prepare(each, images) for each in prompts]
    rows = [SequenceRow(index, Sampling(index % 2, 1.0, 5, seed=index), True) for index in range(len(prompts))]
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
    process = reference.lm.family.image_processor

    def counted(**kwargs: Any) -> Any:
        made.append(kwargs["images"])
        return process(**kwargs)  # type: ignore[misc]

    monkeypatch.setattr(reference.lm.family, "image_processor", counted)
    prompts = [*quiz(image_prompt(), pictures[0])[:6], *quiz(image_prompt(), pictures[1])[:6]]
    await asyncio.gather(*(reference.choose(ChoiceRequest(prompt, ("A", "B"))) for prompt in prompts))
    assert len(made) == 2


async def test_questions_about_an_image_encode_it_once_and_change_nothing(
    reference: TransformersEngine, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Yes-or-no questions in both orders; the slow twin asks each in each order by itself, with nothing shared."""
    lm, encoded = reference.lm, list[int]()
    questions = [f"Is there a {what} anywhere?" for what in ("star", "circle", "red square", "sign", "word", "cross")]
    look = lm.family.look

    def counted(images: Any) -> Any:
        encoded.append(len(images))
        return look(images)

    with monkeypatch.context() as patch:
        patch.setattr(lm.family, "look", counted)
        shapes = passes(lm, patch)
        answers = await YesNoReader(reference, YesNoConfig(least_mass=0)).ask(pictures[0], questions)
    assert encoded == [1] and len(shapes) > 1
    prompts = [[prompt_of(pictures[0], question, order) for order in ORDERS] for question in questions]
    whole = sum(len(lm.prepare(prompt).ids) for pair in prompts for prompt in pair)
    assert sum(rows * width for rows, width in shapes) < whole / 2
    monkeypatch.setattr(lm, "share_prefixes", False)
    for answer, pair in zip(answers, prompts, strict=True):
        scores = [(await reference.choose(ChoiceRequest(prompt, ("A", "B")))).logprobs for prompt in pair]
        yes_first, no_first = ([value for value in both if value is not None] for both in scores)
        odds = (yes_first[0] - yes_first[1] + no_first[1] - no_first[0]) / 2
        assert answer.probability == pytest.approx(sigmoid(odds), abs=1e-5)
    assert len({answer.probability for answer in answers}) > 1
