"""Text statistics of one system's captions: length, distinct words, repetition, identical captions."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from ...stages.annotate.loops import find_loop, units_of
from ...stages.annotate.quality_gate import QualityGateConfig
from ...stages.filter.ngrams import COLORS, GRAM, repeated_share, words_of
from ..rewards.token_penalties import PhrasesConfig, find_all, patterns_of

_PHRASES = patterns_of(PhrasesConfig())
_LOOP_REPEATS = QualityGateConfig().loop_repeats


@dataclass(frozen=True)
class TextStatistics:
    """Figures over all captions of a system; shares are between 0 and 1, None if nothing could be counted."""

    captions: int
    words: float | None  # mean length
    tokens: float | None  # mean length in tokens of the captioner, over captions with a known length
    vocabulary: int  # distinct words
    distinct_1: float | None  # share of distinct words among all words (Li et al. 2016)
    distinct_2: float | None  # the same for bigrams
    loops: float | None  # share of captions in which a phrase loops
    rep_4: float | None  # mean share of repeated 4-grams in a caption, of those with four words (Welleck et al. 2020)
    identical: float | None  # share of captions identical to another image's
    colors: float | None = None  # mean number of distinct colour words in a caption (VLRM counts these)
    phrases: float | None = None  # share of captions with boilerplate (defaults of the `phrases` reward)


@dataclass
class TextTally:
    """Accumulates statistics caption by caption; keeps counts, distinct words and bigrams, digests, but no captions."""

    captions: int = 0
    words: int = 0
    pairs: int = 0
    loops: int = 0
    colors: int = 0
    phrases: int = 0
    tokens: list[int] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    vocabulary: set[str] = field(default_factory=set)
    distinct_pairs: set[tuple[str, str]] = field(default_factory=set)
    copies: Counter[bytes] = field(default_factory=Counter)
    image_of: dict[bytes, int | None] = field(default_factory=dict)  # None: several images

    def add(self, text: str, n_tokens: int | None, image: int) -> None:
        """Count one caption of image number ``image``."""
        words = words_of(text)
        pairs = list(pairwise(words))
        self.captions += 1
        self.words += len(words)
        self.pairs += len(pairs)
        self.vocabulary.update(words)
        self.distinct_pairs.update(pairs)
        self.loops += loops(text)
        self.colors += len(COLORS.intersection(words))
        self.phrases += bool(find_all(_PHRASES, text))
        if n_tokens is not None:
            self.tokens.append(n_tokens)
        if len(words) >= GRAM:
            self.repeated.append(repeated_share(words))
        digest = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
        self.copies[digest] += 1
        if self.image_of.setdefault(digest, image) != image:
            self.image_of[digest] = None

    def statistics(self) -> TextStatistics:
        """Figures over all added captions."""
        identical = sum(count for digest, count in self.copies.items() if self.image_of[digest] is None)
        return TextStatistics(
            captions=self.captions,
            words=_ratio(self.words, self.captions),
            tokens=_ratio(sum(self.tokens), len(self.tokens)),
            vocabulary=len(self.vocabulary),
            distinct_1=_ratio(len(self.vocabulary), self.words),
            distinct_2=_ratio(len(self.distinct_pairs), self.pairs),
            loops=_ratio(self.loops, self.captions),
            rep_4=_ratio(sum(self.repeated), len(self.repeated)),
            identical=_ratio(identical, self.captions),
            colors=_ratio(self.colors, self.captions),
            phrases=_ratio(self.phrases, self.captions),
        )


def loops(text: str) -> bool:
    """Whether a phrase loops, by the quality gate's default threshold; equal cells of a table count, too."""
    # Fast check first: any loop repeats a 4-gram, and most captions repeat none; the search for loops is slow.
    return repeated_share([unit.text for unit in units_of(text)]) > 0 and find_loop(text, _LOOP_REPEATS) is not None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
