"""Whether captions fit the context of the model that is to answer from them: arithmetic, before anything is asked.

A prompt is the chat's frame with the instructions, the caption, a question with its options, and room for the answer.
Tokens are counted by the reader's own tokenizer. Where a server keeps it to itself they are taken from the text's
bytes, rather too many than too few.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import BadInput
from .engines.base import Prompt
from .engines.http.server import served_context
from .engines.loading import EngineConfig
from .engines.model_folder import resolve_model
from .engines.plain_text import plain_text
from .engines.thinking import thinks
from .model_json import read_json
from .own_code import reason_in_words
from .quiz import Question, caption_prompt, put
from .reader import QuizReader, ReaderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Count = Callable[[str], int]  # tokens of a text

LONGEST = 32  # questions of a set whose tokens are counted, those with the most bytes; and texts that are compared
BYTES_PER_TOKEN = 2  # where the tokenizer is hidden; text in any language has more
FRAME = 64  # tokens of a chat's frame (a default system message among them), where only the text can be counted


def telling(questions: Iterable[Question]) -> tuple[Question, ...]:
    """All of a set that these checks need: the longest ones, and one with the most options. Empty for none."""
    wide: list[Question] = []

    def noted() -> Iterator[Question]:
        for question in questions:
            if not wide or len(question.options) > len(wide[0].options):
                wide[:] = [question]
            yield question

    long = heapq.nlargest(LONGEST, noted(), key=lambda each: len(_put(each).encode()))
    return (*long, *wide)


def _put(question: Question) -> str:
    return put(question, range(len(question.options) + 1))


def _answer(config: ReaderConfig, thinks: bool = False) -> int:
    """Tokens that an answer, with the thought before it, needs room for."""
    if thinks:
        return config.answer_tokens
    return config.max_tokens if config.mode == "sampled" else 1


# --- by a running engine ---------------------------------------------------------------------------------------------


async def room(reader: QuizReader, questions: Sequence[Question]) -> int | None:
    """Tokens that a caption may have beside any of ``questions`` (:func:`telling`), below 0 where not even they fit.

    None where the reader is a server that does not tell its context.
    """
    context = reader.engine.context
    if context is None:
        return None
    beside = max([await _tokens(reader, "", question) for question in questions], default=0)
    return context - beside - _answer(reader.config, await thinks(reader.engine))


async def caption_tokens(reader: QuizReader, caption: str, question: Question) -> int:
    """What a caption adds to the reader's prompt, in its tokens."""
    return await _tokens(reader, caption, question) - await _tokens(reader, "", question)


async def _tokens(reader: QuizReader, caption: str, question: Question) -> int:
    text = caption_prompt(caption, reader.config.abstain) + _put(question)
    counted = await reader.engine.count_tokens(Prompt(text))
    return by_bytes(text) + FRAME if counted is None else counted


async def tokens_for(reader: QuizReader, most: int, texts: Sequence[str], count: Count, question: Question) -> int:
    """A caption of ``most`` tokens of the model that writes it, in the reader's tokens.

    ``count``: the writer's tokens of a text. The reader needs as many for each of the writer's as it does for
    ``texts``, such as captions have, and never fewer than the writer: its captions may be of other words.
    """
    texts = sorted(texts, key=lambda text: -len(text))[:LONGEST]
    theirs = sum([await caption_tokens(reader, text, question) for text in texts])
    ours = sum(count(text) for text in texts)
    hidden = await reader.engine.count_tokens(Prompt("A")) is None
    return most if hidden or not ours else math.ceil(most * max(1.0, theirs / ours))


async def check_asked(reader: QuizReader, name: str, questions: Sequence[Question]) -> None:
    """Put the question with the most options once. Raises BadInput where the reader cannot be asked it.

    It cannot where a letter is no single token of its, or where a server does not report log-probabilities.
    """
    question = max(questions, key=lambda each: len(each.options))
    (answer,) = await reader.answer(None, [(question, tuple(range(len(question.options) + 1)))])
    if isinstance(answer, str):
        raise BadInput(
            f"{name}: a question with {len(question.options)} options cannot be put to it ({answer}); "
            "take another reader, or questions with fewer options"
        )


# --- by its folder, before it is started -----------------------------------------------------------------------------


def context_of(config: EngineConfig) -> int | None:
    """The longest context that the engine can come to have; None where a server does not tell, or a folder.

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
    if config.kind != "transformers":  # vLLM takes what positions are stretched to; transformers' engine does not
        rope = own.get("rope_scaling") or own.get("rope_parameters") or {}
        most = math.ceil(most * max(1.0, float(rope.get("factor") or 1.0)))
    return min(most, config.max_model_len or most)


def counter_of(config: EngineConfig) -> Count:
    """Counts a text's tokens by the tokenizer of an engine's model, by its bytes where that is not at hand."""
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
    """As :func:`room`, of a reader that is not started yet and may, for all that is known, think first."""
    prompts = (caption_prompt("", config.abstain) + _put(question) for question in questions)
    beside = max(map(count, prompts), default=0)
    return context - beside - FRAME - _answer(config)
