"""Checks that captions fit the context of the reader's model, before any request is sent.

A prompt is the chat frame with the instructions, the caption, a question with its options, and room for the answer.
Tokens are counted by the reader's own tokenizer. Where a server does not expose it, they are estimated from the number
of bytes, too high rather than too low.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import BadInput
from .engines.base import Engine, ImageInput, Prompt
from .engines.http.server import served_context
from .engines.loading import EngineConfig
from .engines.model_folder import resolve_model
from .engines.plain_text import plain_text
from .engines.thinking import thinks
from .model_json import read_json
from .own_code import reason_in_words
from .quiz import Question, caption_prompt, one_line, put
from .reader import QuizReader, ReaderConfig
from .yes_no import CHECK, ORDERS, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Count = Callable[[str], int]  # tokens of a text

LONGEST = 32  # questions of a set whose tokens are counted (those with the most bytes), and texts that are compared
BYTES_PER_TOKEN = 2  # where the tokenizer is not available; text in any language has more
FRAME = 64  # tokens of the chat frame (including a default system message), where only the text can be counted


def telling(questions: Iterable[Question]) -> tuple[Question, ...]:
    """The questions that these checks need: the longest ones, and one with the most options. Empty for none."""
    wide: list[Question] = []

    def noted() -> Iterator[Question]:
        for question in questions:
            if not wide or len(question.options) > len(wide[0].options):
                wide[:] = [question]
            yield question

    long = heapq.nlargest(LONGEST, noted(), key=lambda question: len(_put(question).encode()))
    return (*long, *wide)


def _put(question: Question) -> str:
    return put(question, range(len(question.options) + 1))


def _answer(config: ReaderConfig, thinks: bool = False) -> int:
    """Tokens to reserve for an answer and the thought before it."""
    if thinks:
        return config.answer_tokens
    return config.max_tokens if config.mode == "sampled" else 1


# --- with a running engine -------------------------------------------------------------------------------------------


async def room(reader: QuizReader, questions: Sequence[Question]) -> int | None:
    """Tokens left for a caption beside any of ``questions`` (:func:`telling`); negative where not even they fit.

    None where the reader is a server that does not report its context.
    """
    context = reader.engine.context
    if context is None:
        return None
    beside = max([await _tokens(reader, "", question) for question in questions], default=0)
    return context - beside - _answer(reader.config, await thinks(reader.engine))


async def caption_tokens(reader: QuizReader, caption: str, question: Question) -> int:
    """Tokens that a caption adds to the reader's prompt."""
    return await _tokens(reader, caption, question) - await _tokens(reader, "", question)


async def _tokens(reader: QuizReader, caption: str, question: Question) -> int:
    text = caption_prompt(caption, reader.config.abstain, reader.config.prompt) + _put(question)
    return await prompt_tokens(reader.engine, text)


async def prompt_tokens(engine: Engine, text: str) -> int:
    """Tokens of a prompt without an image, the chat frame included; an estimate where the engine cannot count."""
    counted = await engine.count_tokens(Prompt(text))
    return by_bytes(text) + FRAME if counted is None else counted


async def tokens_for(reader: QuizReader, most: int, texts: Sequence[str], count: Count, question: Question) -> int:
    """The reader's tokens for a caption of ``most`` tokens of the model that writes it.

    ``count``: the writer's tokens of a text. The ratio of reader to writer tokens is that of ``texts``, which resemble
    captions, and at least 1: new captions may use other words.
    """
    texts = sorted(texts, key=lambda text: -len(text))[:LONGEST]
    theirs = sum([await caption_tokens(reader, text, question) for text in texts])
    ours = sum(count(text) for text in texts)
    hidden = await reader.engine.count_tokens(Prompt("A")) is None
    return most if hidden or not ours else math.ceil(most * max(1.0, theirs / ours))


async def statement_tokens(engine: Engine, statement: str) -> int:
    """Tokens of the prompt by which a statement about an image is checked (:mod:`.yes_no`), without the image."""
    return await prompt_tokens(
        engine, prompt_of(ImageInput(""), CHECK.format(text=one_line(statement)), ORDERS[0]).text
    )


async def check_asked(reader: QuizReader, name: str, questions: Sequence[Question]) -> None:
    """Ask the question with the most options once. Raises BadInput where the reader cannot answer it.

    That is so where a letter is not a single token of its model, or where a server does not report log-probabilities.
    """
    question = max(questions, key=lambda question: len(question.options))
    (answer,) = await reader.answer(None, [(question, tuple(range(len(question.options) + 1)))])
    if isinstance(answer, str):
        raise BadInput(
            f"{name}: a question with {len(question.options)} options cannot be put to it ({answer}); "
            "take another reader, or questions with fewer options"
        )


# --- from the model folder, before the engine starts -----------------------------------------------------------------


def context_of(config: EngineConfig) -> int | None:
    """The longest context that the engine can have; None where a server or a folder does not say.

    Raises BadInput where there is no such model or no server.
    """
    if config.is_http:
        return served_context(config.kind, config.model)
    if config.is_own:
        return config.max_model_len
    folder = read_json(resolve_model(config.model) / "config.json")
    own = folder.get("text_config", folder)
    most = own.get("max_position_embeddings") or folder.get("max_position_embeddings")
    if type(most) is not int:
        return config.max_model_len
    if config.kind != "transformers":  # vLLM accepts the length after RoPE scaling; the transformers engine does not
        rope = own.get("rope_scaling") or own.get("rope_parameters") or {}
        most = math.ceil(most * max(1.0, float(rope.get("factor") or 1.0)))
    return min(most, config.max_model_len or most)


def counter_of(config: EngineConfig) -> Count:
    """Counts tokens with the tokenizer of an engine's model, or estimates them from bytes where there is none."""
    if config.is_http or config.is_own:
        return by_bytes
    from transformers import AutoTokenizer

    folder = str(resolve_model(config.model))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{config.model}: its tokenizer does not load ({reason_in_words(error)})") from error
    plain = plain_text(tokenizer)
    return lambda text: len(tokenizer.encode(plain(text), add_special_tokens=False, verbose=False))


def by_bytes(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def room_of(context: int, config: ReaderConfig, questions: Sequence[Question], count: Count) -> int:
    """Like :func:`room`, for a reader that is not started yet; it is unknown whether it thinks first."""
    prompts = (caption_prompt("", config.abstain, config.prompt) + _put(question) for question in questions)
    beside = max(map(count, prompts), default=0)
    return context - beside - FRAME - _answer(config)
