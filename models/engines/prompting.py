"""Encoding of a :class:`~.base.Prompt` as token ids, the same in every in-process engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .base import ImageInput, Prompt, PromptKey, Rejected, Thought
from .plain_text import plain_prompt, plain_text
from .thinking import CLOSING, OPENING, Tags, split_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_PROMPTS = 1024  # captioning repeats a handful of prompts for millions of images; quiz prompts never repeat


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its arguments besides the chat; made by :func:`.chat_templates.open_encoder`.

    ``text`` None: the tokenizer's own. ``thinking``: the tags of the model's thoughts, where the template lets it
    think.
    """

    text: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    thinking: Tags | None = None

    def render(self, tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]]) -> str:
        """The chat as text up to the model's turn (transformers' sandbox). Raises whatever a template does."""
        text = tokenizer.apply_chat_template(
            chat, chat_template=self.text, tokenize=False, add_generation_prompt=True, **self.arguments
        )
        return str(text)


class PromptEncoder:
    """Renders chats with a model's own template and caches the ids of recent ones. Not thread-safe.

    Control tokens come from the template alone: text in a prompt is encoded as plain characters (:mod:`.plain_text`).
    ``image_token_id``: the placeholder token of an image, None for a text-only model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int | None,
        template: ChatTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._plain = plain_text(tokenizer)
        self._image_token_id = image_token_id
        self._template = template or ChatTemplate()
        self.thinking = self._template.thinking
        self._hidden_tags = hidden_tags(tokenizer)
        self._recent: OrderedDict[PromptKey, tuple[int, ...]] = OrderedDict()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's ids up to the model's turn; an image is a single placeholder, not expanded yet.

        Raises Rejected for an image given to a text-only model, and for a chat that the template does not accept.
        """
        image = None if prompt.image is None else ""  # any image is one placeholder
        key = (prompt.system, prompt.text, prompt.thought, prompt.answer_prefix, image)
        if (known := self._recent.get(key)) is not None:
            self._recent.move_to_end(key)
            return known
        ids = tuple(self._encoded(plain_prompt(prompt, self._plain)))
        if self._image_token_id is not None and (put := ids.count(self._image_token_id)) != (prompt.image is not None):
            raise Rejected(f"the chat template puts {put} image placeholders around this text; fix the template")
        self._recent[key] = ids
        if len(self._recent) > CACHED_PROMPTS:
            self._recent.popitem(last=False)
        return ids

    def image_tokens(self, ids: Sequence[int]) -> int | None:
        """How many ids of an expanded prompt stand for its image; None where none ever does."""
        return None if self._image_token_id is None else ids.count(self._image_token_id)

    def _encoded(self, prompt: Prompt) -> list[int]:
        if prompt.image is not None and self._image_token_id is None:
            raise Rejected("the prompt has an image, but the model reads text only")
        try:
            text = self._template.render(self._tokenizer, messages(prompt))
        except Exception as error:  # templates may raise anything
            raise Rejected(f"the chat template refuses the prompt: {type(error).__name__}: {error}") from error
        if prompt.system is not None and prompt.system.strip() not in text:
            raise Rejected("the model's chat template leaves the system message out; do without one")
        return self._tokens(text + self._thought(prompt) + prompt.answer_prefix)

    def _thought(self, prompt: Prompt) -> str:
        if prompt.thought is None:
            return ""
        if self.thinking is None:
            raise Rejected("the prompt has a thought, but the model's chat template does not let it think")
        return self.thinking.closed(prompt.thought)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def choice_ids(self, choices: tuple[str, ...]) -> list[int]:
        """The token id of each choice. Raises Rejected where a choice is not exactly one token."""
        ids = [self._tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
        split = [choice for choice, tokens in zip(choices, ids, strict=True) if len(tokens) != 1]
        if split:
            raise Rejected(f"not a single token in this model's vocabulary: {', '.join(map(repr, split))}")
        return [tokens[0] for tokens in ids]

    @property
    def end_id(self) -> int | None:
        """The tokenizer's own token for the end of a text, if it has one."""
        end = self._tokenizer.eos_token_id
        return end if isinstance(end, int) else None

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain text, as if the model had written it."""
        return self._tokens(self._plain(text))

    def answer(self, token_ids: list[int]) -> tuple[str, Thought | None]:
        """The text of a completion without the thought before it, and that thought."""
        text, start = "", 0
        for index, token in enumerate(token_ids):
            if token in self._hidden_tags:
                text += self.decode(token_ids[start:index]) + self._hidden_tags[token]
                start = index + 1
        text += self.decode(token_ids[start:])
        return split_thought(text, self.thinking is not None and self.thinking.begun)

    def decode(self, token_ids: list[int]) -> str:
        """The text of a completion, without special tokens and with spaces exactly as the model wrote them."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class CaptionerEncoder(PromptEncoder):
    """For captioners that are not chat models: the token ``start``, and the words that a caption continues.

    ``image_token_id``: the placeholder before them, None where no id stands for the image. ``prompted``: whether the
    model takes words.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int | None, start: int, prompted: bool
    ) -> None:
        super().__init__(tokenizer, image_token_id)
        self._before = [start] if image_token_id is None else [image_token_id, start]
        self._prompted = prompted

    def _encoded(self, prompt: Prompt) -> list[int]:
        text = prompt.text + prompt.answer_prefix
        if prompt.image is None:
            raise Rejected("the prompt has no image, and the model does nothing but describe one")
        if prompt.system is not None:
            raise Rejected("the model reads no system message; leave it out")
        if text and not self._prompted:
            raise Rejected("the model reads no prompt; leave the text empty")
        return [*self._before, *self._tokens(text)]


def hidden_tags(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tags of a thought by their ids, where they are special tokens of the vocabulary, which decoding omits."""
    hidden: dict[int, str] = {}
    for tag in (OPENING, CLOSING):
        ids: list[int] = tokenizer.encode(tag, add_special_tokens=False)
        if len(ids) == 1 and not tokenizer.decode(ids, skip_special_tokens=True):
            hidden[ids[0]] = tag
    return hidden


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The chat in the form that templates take; an image comes before the text."""
    chat: list[dict[str, Any]] = []
    if prompt.system is not None:
        chat.append({"role": "system", "content": prompt.system})
    content: Any = prompt.text
    if prompt.image is not None:
        content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    chat.append({"role": "user", "content": content})
    return chat


def rgb_pixels(image: ImageInput) -> npt.NDArray[np.uint8]:
    """The image's pixels, ``(height, width, 3)``. Raises Rejected where they are missing or malformed."""
    pixels = image.pixels
    if pixels is None:
        raise Rejected(f"image {image.uid} has no pixels; an in-process engine reads pixels, not encoded bytes")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise Rejected(f"image {image.uid} is {pixels.dtype} {pixels.shape}, not uint8 (height, width, 3)")
    return pixels
