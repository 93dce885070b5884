"""Score: how well each image's captions fit it, the new one and the one it came with; thresholds are for later.

Rows are scored in chunks that begin at the shard's start, so that the same rows share a batch however often a run was
interrupted: sums in another order would differ in their last bits, and with them the final shards' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.images.decode import Pixels
from ...models.images.preprocess import Preprocess
from ...models.scorers.base import AskedCaptions, CaptionScore, Scorer, ask_captions, distinct_texts, score_asked
from ...models.scorers.sentences import split_sentences
from ..annotate.captioner import chosen_caption
from .ngrams import repeated_share, words_of

CAPTIONS = "captions"  # the annotate artifact, in a row's ``beside``
CHUNK = 64
NEW, ORIGINAL = "re", "org"


class SafetyDetector(Protocol):
    """Finds what must not be shown. ``detect``: for n images of ``view`` the labels found, each with its score."""

    preprocess: Preprocess

    def detect(self, pixels: Sequence[Pixels]) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class SeenRow:
    """A row with its captions by prefix and its image, by its index among the chunk's distinct ones."""

    row: Row
    captions: Mapping[str, str]
    image: int


@dataclass(frozen=True)
class PreparedRows:
    """Rows that only models have yet to look at: their images, output rows, captions by row and prefix, and tokens."""

    images: list[int]
    described: list[dict[str, Any]]
    asked: list[tuple[int, str]]
    captions: AskedCaptions
    tokens: list[Any]


@dataclass(frozen=True)
class CaptionScorer:
    """Scores chunks of rows with all scorers. An image's views are those of the scorers, then the detector's."""

    scorers: tuple[Scorer, ...]
    safety: SafetyDetector | None = None

    @property
    def preprocesses(self) -> tuple[Preprocess, ...]:
        """The pixels wanted of every image."""
        seen = tuple(scorer.preprocess for scorer in self.scorers)
        return seen if self.safety is None else (*seen, self.safety.preprocess)

    def prepare(self, rows: Sequence[SeenRow]) -> PreparedRows:
        """All that needs no model: words counted, sentences split, texts tokenized for every scorer."""
        asked = [(number, prefix) for number, seen in enumerate(rows) for prefix in seen.captions]
        captions = ask_captions([(rows[number].image, rows[number].captions[prefix]) for number, prefix in asked])
        texts = list(distinct_texts(captions.pairs))
        described_rows = [{**described(seen.row, seen.captions), "status": str(Status.OK)} for seen in rows]
        tokens = [scorer.tokenize(texts) for scorer in self.scorers]
        return PreparedRows([seen.image for seen in rows], described_rows, asked, captions, tokens)

    def score(self, rows: PreparedRows, images: Sequence[tuple[Pixels, ...]]) -> list[dict[str, Any]]:
        """The output rows. A score that is no number makes its row an ``engine_error``, to be tried again."""
        out = rows.described
        for position, scorer in enumerate(self.scorers):
            pixels = [views[position] for views in images]
            scores = score_asked(scorer, pixels, rows.captions, rows.tokens[position])
            for (number, prefix), score in zip(rows.asked, scores, strict=True):
                _enter(out[number], scorer.name, prefix, score)
        if self.safety is not None:
            found = self.safety.detect([views[-1] for views in images])
            for image, row in zip(rows.images, out, strict=True):
                labels = found[image]
                row |= {"unsafe": max(labels.values(), default=0.0), "unsafe_labels": sorted(labels)}
        return out

    def reason(self, row: SeenRow, image: tuple[Pixels, ...], error: Exception) -> str:
        """Why a row cannot be scored even by itself: the scorer that fails, and on what: its image or a caption."""
        for scorer, pixels in zip(self.scorers, image, strict=False):
            subject = "the image"
            try:
                scorer.encode_images([pixels])
                for prefix, text in row.captions.items():
                    subject = f"{prefix}_caption"
                    asked = ask_captions([(0, text)])
                    score_asked(scorer, [pixels], asked, scorer.tokenize(list(distinct_texts(asked.pairs))))
            except Exception as own:
                return f"{scorer.name} cannot score {subject}: {type(own).__name__}: {own}"
        return f"{type(error).__name__}: {error}"


def _enter(row: dict[str, Any], scorer: str, prefix: str, score: CaptionScore) -> None:
    if not score.finite:
        reason = f"{scorer} gave no number for {prefix}_caption; score again with --retry, in float32 if it repeats"
        row |= {"status": str(Status.ENGINE_ERROR), "error": reason}
        return
    start = f"{prefix}_{scorer}"
    row[f"{start}_score"], row[f"{start}_score_mean"] = score.score, score.mean
    row[f"{start}_score_min"], row[f"{start}_lowest"] = score.least, score.lowest


def captions_of(row: Row) -> dict[str, str]:
    """A row's captions by prefix: the new one where an annotate row lies beside it, the original where it has one."""
    found = {}
    if CAPTIONS in row.beside and (text := chosen_caption(row.beside[CAPTIONS])).strip():
        found[NEW] = text
    if row.text is not None and row.text.strip():
        found[ORIGINAL] = row.text
    return found


def unscored(row: Row) -> dict[str, Any] | None:
    """The output row of one that has nothing to be scored, or that its captions' run gave up; None for others."""
    if row.status is not Status.OK:
        return passed_on(row)
    beside = row.beside.get(CAPTIONS)
    if beside is not None and beside["status"] != Status.OK:
        return {**passed_on(row), "status": beside["status"], "error": beside["error"]}
    wanted = NEW if beside is not None else ORIGINAL
    if wanted in captions_of(row):
        return None
    text = "the new caption is empty" if beside is not None else "no caption came with the image"
    return {**passed_on(row), "status": str(Status.EMPTY), "error": text}


def passed_on(row: Row) -> dict[str, Any]:
    """An output row without scores: the row's own status and reason, and its captions."""
    return described(row, captions_of(row))


def described(row: Row, captions: Mapping[str, str]) -> dict[str, Any]:
    """What can be said of a row without a model."""
    out: dict[str, Any] = {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
    for prefix, text in captions.items():
        words = words_of(text)
        out |= {
            f"{prefix}_caption": text,
            f"{prefix}_length": len(words),
            f"{prefix}_sentences": len(split_sentences(text)),
            f"{prefix}_repetition": repeated_share(words),
            f"{prefix}_language": language_of(text),
        }
    return out


def language_of(text: str) -> str:
    """ISO 639-1, the likeliest of the 97 that py3langid knows (Lui and Baldwin, 2012); a guess for a few words."""
    import py3langid  # loads its model, which takes a moment

    language: str = py3langid.classify(text[:2000])[0]
    return language
