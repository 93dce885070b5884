"""Context length from the prompts a model gets, instead of the maximum it supports.

vLLM reserves memory for one request of the whole context before it starts: 36 GiB for the 262,144 tokens of a
Qwen3-VL-4B, for prompts of some thousand.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..images.grid import ImageGrid
from ..model_json import read_json
from .base import Rejected

TEMPLATE_ROOM = 512  # tokens that a chat template adds to the text, a default system message included
QUESTION_ROOM = 4096  # tokens of a question with its options; written ones have a hundred, imported ones may be long
#: Tokens of a caption in another model's vocabulary, per token of the model that wrote it.
OTHER_VOCABULARY = 2


def text_room(texts: Iterable[str | None], answer_tokens: int) -> int:
    """Upper bound on the tokens of the longest of ``texts``, the chat around it and the answer.

    A token of a byte-level vocabulary stands for at least one byte, so no tokenizer is needed.
    """
    longest = max((len(text.encode()) for text in texts if text), default=0)
    return TEMPLATE_ROOM + longest + answer_tokens


def quiz_room(caption_tokens: int, answer_tokens: int) -> int:
    """Upper bound on the tokens of a question about a caption of ``caption_tokens`` (0: none), and of the answer."""
    return TEMPLATE_ROOM + QUESTION_ROOM + OTHER_VOCABULARY * caption_tokens + answer_tokens


def image_tokens(grid: ImageGrid | None) -> int:
    """Tokens of the largest image that a model takes."""
    return 0 if grid is None else grid.max_pixels // grid.factor**2


def context_length(model_path: Path, grid: ImageGrid | None, room: int | None) -> int | None:
    """Context for an image and ``room`` tokens beside it, at most the model's own; None: the model's own."""
    if room is None:
        return None
    config = read_json(model_path / "config.json")
    text = config.get("text_config") or {}
    own = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    needed = image_tokens(grid) + room
    return min(needed, own) if isinstance(own, int) else needed


def too_long(tokens: int, context: int) -> Rejected:
    """The error for a prompt that leaves no room in the context."""
    return Rejected(f"the prompt's {tokens} tokens leave no room to answer in {context}; give a larger --max-model-len")
