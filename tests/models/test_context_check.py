"""Whether a caption fits its reader: the arithmetic against what engines really take."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from capipe.errors import BadInput
from capipe.models.context_check import (
    LONGEST,
    by_bytes,
    caption_tokens,
    check_asked,
    context_of,
    counter_of,
    room,
    room_of,
    telling,
    tokens_for,
)
from capipe.models.engines.base import RequestError
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.quiz import Question
from capipe.models.reader import QuizReader, ReaderConfig

from ..scripted import Scripted, pick

SHORT = Question("Which?", ("red", "blue"), 0)
LONG = Question("What color is the large star at the top left of the image?", ("red", "blue", "green", "gray"), 2)
TEN = Question("Which?", tuple("abcdefghij"), 0)
CONFIG = EngineConfig("transformers", "tiny/reader", max_model_len=200)


@pytest.fixture
async def reader() -> AsyncIterator[QuizReader]:
    engine = await load_engine(CONFIG)
    yield QuizReader(engine, ReaderConfig())
    await engine.aclose()


def counted(context: int | None, **options: int | str) -> QuizReader:
    engine = Scripted(lambda request: pick(request, "A"))
    engine.context = context
    return QuizReader(engine, ReaderConfig.model_validate(options))


async def test_a_caption_of_just_the_room_is_answered_and_one_token_more_is_not(reader: QuizReader) -> None:
    left = await room(reader, [SHORT, LONG])
    assert left is not None and 0 < left < 200
    word = " star"
    assert await caption_tokens(reader, word * 7, LONG) - await caption_tokens(reader, word * 6, LONG) == 1
    fits = word * (left - await caption_tokens(reader, "", LONG))
    while await caption_tokens(reader, fits, LONG) > left:
        fits = fits.removesuffix(word)
    assert await caption_tokens(reader, fits, LONG) == left
    for question in (SHORT, LONG):
        (reading,) = await reader.read(fits, [question])
        assert reading.errors == ()
    (longer,) = await reader.read(fits + word, [LONG])
    assert len(longer.errors) == len(longer.chosen) and "leave no room to answer" in longer.errors[0]


async def test_what_is_known_before_the_engine_is_started_is_never_more_than_it_has(reader: QuizReader) -> None:
    context = context_of(CONFIG)
    assert context == reader.engine.context == 200
    before, running = (
        room_of(context, ReaderConfig(), [SHORT, LONG], counter_of(CONFIG)),
        await room(reader, [SHORT, LONG]),
    )
    assert running is not None and running - 64 <= before <= running


async def test_a_sampled_answer_needs_its_own_room() -> None:
    chosen, sampled = counted(100), counted(100, mode="sampled", max_tokens=9)
    there, beside = await room(chosen, [LONG]), await room(sampled, [LONG])
    assert there is not None and beside == there - 8
    assert await room(counted(None), [LONG]) is None


async def test_the_writers_tokens_become_the_readers() -> None:
    """The scripted reader counts words."""
    texts = ["a b c d", "e f"]
    assert await tokens_for(counted(100), 50, texts, lambda text: len(text.split()), SHORT) == 50
    assert await tokens_for(counted(100), 50, texts, lambda text: len(text.split()) // 2, SHORT) == 100
    assert await tokens_for(counted(100), 50, texts, len, SHORT) == 50, "never fewer than the writer's"
    assert await tokens_for(counted(100), 50, [], len, SHORT) == 50
    assert await tokens_for(counted(None), 50, texts, lambda text: 1, SHORT) == 50, "a server keeps its tokenizer"


def test_a_few_questions_tell_all_that_is_asked_of_a_set() -> None:
    rng = Random(0)
    many = [Question("word " * rng.randint(1, 90), ("a", "b"), 0) for _ in range(500)]
    found = telling([*many[:250], TEN, *many[250:]])
    assert len(found) == LONGEST + 1 and found[-1] == TEN
    assert found[:LONGEST] == tuple(sorted(many, key=lambda each: -len(each.text)))[:LONGEST]
    assert telling([]) == ()


def test_contexts_by_a_folders_configuration(tmp_path: Path) -> None:
    def of(config: dict[str, object], kind: str = "transformers", most: int | None = None) -> int | None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return context_of(EngineConfig(kind, str(tmp_path), max_model_len=most))

    assert of({"max_position_embeddings": 4096}) == 4096 and of({"max_position_embeddings": 4096}, most=1000) == 1000
    assert of({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9}) == 512
    assert of({}) is None and of({}, most=700) == 700
    stretched = {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert of(stretched, "vllm") == 131072 and of(stretched) == 32768
    with pytest.raises(BadInput, match="no such model folder"):
        context_of(EngineConfig("transformers", str(tmp_path / "none")))


def test_a_hidden_tokenizer_is_counted_by_bytes() -> None:
    assert (by_bytes(""), by_bytes("abc"), by_bytes("颜色")) == (0, 2, 3)


async def test_letters_that_are_no_single_tokens_are_found_at_the_start() -> None:
    def choose(request: object) -> list[float] | RequestError:
        letters = request.choices  # type: ignore[attr-defined]
        return (
            RequestError("not a single token in this model's vocabulary: 'K'")
            if "K" in letters
            else [0.0] * len(letters)
        )

    reader = QuizReader(Scripted(choose), ReaderConfig())
    await check_asked(reader, "m", [SHORT, LONG])
    with pytest.raises(BadInput, match=r"m: a question with 10 options cannot be put to it .*single token.*'K'"):
        await check_asked(reader, "m", [SHORT, TEN, LONG])
