"""Per-token penalties for listed phrases and repetition (VLRM, arXiv 2404.01911: bad, repeat).

The paper does not state the size of a penalty: here it is 1 per occurrence, times the reward's weight.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ...models.engines.base import Completion
from ...stages.filter.ngrams import repeats, word_ends
from ..dataset import Example
from .base import RewardConfig, RewardSpec, Scored

Decode = Callable[[list[int]], str]  # the policy's tokenizer: ids -> text, without special tokens
YEAR = r"\b(?:1[5-9]|20)\d\d\b"


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """Pattern that matches ``phrase`` as whole words, ignoring case and the amount of whitespace."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    before, after = (r"(?<!\w)" if phrase[0].isalnum() else ""), (r"(?!\w)" if phrase[-1].isalnum() else "")
    return re.compile(f"{before}{words}{after}", re.IGNORECASE)


def find_all(patterns: Mapping[str, re.Pattern[str]], text: str) -> list[tuple[str, int]]:
    """Name and end position in ``text`` of every match of the patterns."""
    return [(name, match.end()) for name, pattern in patterns.items() for match in pattern.finditer(text)]


def tokens_at(caption: Completion, ends: Iterable[int], decode: Decode) -> list[int]:
    """Index of the token that completes the caption's text up to each end position.

    Found by decoding prefixes of the ids: the shortest prefix that agrees with the text up to the position.
    If a thought precedes the text: by the length of the decoded suffix.
    """
    ids = list(caption.token_ids)

    def reach(count: int) -> int:
        if caption.thought is not None:
            return len(caption.text) - len(decode(ids[count:]))
        # A character split over two tokens decodes to other text until it is complete.
        return _agreeing(decode(ids[:count]), caption.text)

    counts = range(1, len(ids) + 1)
    return [min(bisect_left(counts, end, key=reach), len(ids) - 1) for end in ends]


def _agreeing(first: str, second: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def charged(caption: Completion, tokens: Iterable[int]) -> tuple[float, ...]:
    """Reward per token of the caption: minus the number of times its index is among ``tokens``."""
    counts = Counter(tokens)
    return tuple(0.0 - counts[token] for token in range(len(caption.token_ids)))


def _penalty(caption: Completion, places: Sequence[int], details: Mapping[str, object]) -> Scored:
    """Penalty with its per-token parts; on the caption as a whole if the engine reports no token ids (some servers)."""
    return Scored(0.0 - len(places), details, charged(caption, places))


def _compiles(pattern: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    if compiled.search("") is not None:
        raise ValueError(f"{pattern!r} is found in an empty text, so everywhere")
    return pattern


def _says_something(phrase: str) -> str:
    if not phrase.strip():
        raise ValueError("a phrase is empty, and so everywhere")
    return phrase


class PhrasesConfig(RewardConfig):
    """Words that say nothing of an image; VLRM's list is not published beyond its examples, which are the defaults."""

    kind: Literal["phrases"] = "phrases"
    phrases: tuple[Annotated[str, AfterValidator(_says_something)], ...] = Field(
        ("an image of", "a picture of", "a photo of", "a photograph of", "a video of"),
        description="found as whole words, case does not matter",
    )
    patterns: tuple[Annotated[str, AfterValidator(_compiles)], ...] = Field(
        (YEAR,), description="regular expressions; by default years from 1500 to 2099"
    )
    weight: float = Field(1.0, description="what one occurrence costs")
    normalise: Literal[False] = False  # a share of a group's spread has no place among tokens

    @model_validator(mode="after")
    def _not_empty(self) -> PhrasesConfig:
        if not self.phrases and not self.patterns:
            raise ValueError("phrases and patterns are both empty: nothing would be looked for; leave the reward out")
        return self


def patterns_of(config: PhrasesConfig) -> dict[str, re.Pattern[str]]:
    """Compiled patterns of the listed phrases and patterns, by their text in ``config``."""
    patterns = {phrase: phrase_pattern(phrase) for phrase in config.phrases}
    return patterns | {pattern: re.compile(pattern, re.IGNORECASE) for pattern in config.patterns}


class PhrasesReward:
    """Minus the number of listed phrases in the caption, each charged to the token that ends it."""

    def __init__(self, config: PhrasesConfig, decode: Decode) -> None:
        self._patterns = patterns_of(config)
        self._decode = decode

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        matches = find_all(self._patterns, caption.text)
        places = tokens_at(caption, (end for _, end in matches), self._decode)
        return _penalty(caption, places, {"phrases": dict(Counter(name for name, _ in matches))} if matches else {})

    async def aclose(self) -> None: ...


class RepeatsConfig(RewardConfig):
    """VLRM draws with no_repeat_ngram_size 2, which transformers counts in tokens; its penalty is not published."""

    kind: Literal["repeats"] = "repeats"
    n: int = Field(2, ge=1, description="length of the runs that are not to come again")
    of: Literal["tokens", "words"] = Field("tokens", description="what runs are of; words: without case, punctuation")
    weight: float = Field(1.0, description="what one repetition costs")
    normalise: Literal[False] = False  # a share of a group's spread has no place among tokens


class RepeatsReward:
    """Minus the number of n-grams that occurred before, each charged to the token that completes it."""

    def __init__(self, config: RepeatsConfig, decode: Decode) -> None:
        self._config, self._decode = config, decode

    async def score(self, example: Example, caption: Completion, sample_id: str) -> Scored:
        if self._config.of == "tokens":
            return _penalty(caption, repeats(caption.token_ids, self._config.n), {})
        words = word_ends(caption.text)
        again = [words[index] for index in repeats([word for word, _ in words], self._config.n)]
        details = {"words": [word for word, _ in again]} if again else {}
        return _penalty(caption, tokens_at(caption, (end for _, end in again), self._decode), details)

    async def aclose(self) -> None: ...


PHRASES = RewardSpec(PhrasesConfig, lambda config, context: PhrasesReward(config, context.decode))
REPEATS = RewardSpec(RepeatsConfig, lambda config, context: RepeatsReward(config, context.decode))
