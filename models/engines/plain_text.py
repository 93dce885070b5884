"""Text from data is read as plain characters, whatever control token it spells.

A tokenizer reads the spelling of any token that was added to its vocabulary as that token: ``<|im_end|>`` in a caption
would end the reader's turn, ``<image>`` claim an image or have no row in a scorer's table. So every spelling gets a
space after its first character before the text is tokenized; all other text stays as it is, byte for byte. The stored
text is unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .base import Prompt

# For servers, whose tokenizers are not known here: control tokens of common model families.
_COMMON = re.compile(
    r"<[|｜][^<>|｜\s]+[|｜]>|</?s>|◁/?\w+▷"
    r"|<(?:bos|eos|pad|unk|mask|cls|sep|img|image|video|audio|image_soft_token|(?:start|end)_of_(?:turn|image|text))>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|THINK)\]"
    r"|\[(?:TOOL_CALLS|TOOL_CONTENT|IMG|IMG_BREAK|IMG_END|CLS|SEP|PAD|UNK|MASK|gMASK|sMASK|sop|eop)\]"
)
BLANKS = " \t\n\r\u2581"  # the last is sentencepiece's space
_WORD = re.compile(r"[\w\u2581]+")
ROUNDS = 4  # a normaliser that has converged changes nothing more, so the second finds nothing

TextMap = Callable[[str], str]


@dataclass(frozen=True)
class PlainText:
    """Breaks up spellings of tokens.

    ``written``: spellings to look for in the text as it is; ``normalised``: spellings to look for in normalised text,
    which is where their tokenizer looks.
    """

    written: re.Pattern[str] | None
    normalised: Sequence[tuple[TextMap, re.Pattern[str]]] = ()

    def __call__(self, text: str) -> str:
        """``text`` without any of the spellings."""
        for _ in range(ROUNDS):
            if self.written is not None:
                text = broken(self.written, text)
            before = text
            for normalise, pattern in self.normalised:
                if pattern.search(seen := normalise(text)):
                    text = broken(pattern, seen)
            if text == before:
                break
        return text


def broken(spellings: re.Pattern[str], text: str) -> str:
    """``text`` with a space after the first character of each match, until nothing matches.

    That ends: no spelling begins with a space, so each space widens a gap, and no spelling has gaps without end.
    """
    while spellings.search(text):
        text = spellings.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def plain_text(*tokenizers: Any) -> PlainText:
    """A filter for texts that all of these tokenizers (transformers') are to read as plain characters."""
    written, normalised = list[str](), list[tuple[TextMap, re.Pattern[str]]]()
    for tokenizer in tokenizers:
        control = [token for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if is_control(token)]
        written += [token.content for token in control]
        normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normaliser is not None:
            pattern = spelled(normaliser.normalize_str(token.content) for token in control if token.normalized)
            normalised += [] if pattern is None else [(normaliser.normalize_str, pattern)]
    return PlainText(spelled(written), normalised)


def is_control(token: Any) -> bool:
    """Whether an AddedToken is more than a piece of text, as ``<think>`` is, though it is not marked special.

    One that is not marked, and is a word or has white space, is vocabulary: the phrases of the bundled readers, runs of
    line breaks, words added by fine-tuning.
    """
    content = str(token.content)
    return bool(token.special) or not (_WORD.fullmatch(content) or re.search(r"\s", content))


def spelled(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of ``tokens`` without the spaces around them, the longest first; None without any.

    A single character ("!" pads some CLIPs) cannot be broken up, and is no sign of a control token: it is left out.
    """
    spellings = {token.strip(BLANKS) for token in tokens}
    longest = sorted(
        (spelling for spelling in spellings if len(spelling) > 1), key=lambda spelling: (-len(spelling), spelling)
    )
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def plain_prompt(prompt: Prompt, plain: TextMap) -> Prompt:
    """The prompt with ``plain`` applied to each of its texts."""
    return replace(
        prompt,
        text=plain(prompt.text),
        system=None if prompt.system is None else plain(prompt.system),
        thought=None if prompt.thought is None else plain(prompt.thought),
        answer_prefix=plain(prompt.answer_prefix),
    )


def plain_for_servers(text: str) -> str:
    """For a server's unknown tokenizer: breaks up common spellings of control tokens."""
    return broken(_COMMON, text)
