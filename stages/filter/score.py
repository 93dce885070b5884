"""Image-text scoring of each image's new and original caption; thresholds are applied later, by selection.

Rows are scored in chunks aligned to the shard's start, so that the same rows share a batch however often a run is
interrupted: another summation order would change the last bits, and with them the final shards' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...manifests.schema import SAFETY
from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.images.decode import Pixels
from ...models.images.preprocess import Preprocess
from ...models.scorers.base import AskedCaptions, CaptionScore, Scorer, ask_captions, distinct_texts, score_asked
from ...models.scorers.sentences import split_sentences
from ...models.scorers.stored import StoredClip
from ..annotate.captioner import chosen_caption
from .ngrams import repeated_share, words_of

CAPTIONS, EMBEDDINGS = "captions", "embeddings"  # names of artifacts of annotate and embed in a row's ``beside``
CHUNK = 64
NEW, ORIGINAL = "re", "org"


class SafetyDetector(Protocol):
    """Detector of unsafe images. ``detect``: for each of n images the labels found, with their scores."""

    preprocess: Preprocess

    def detect(self, pixels: Sequence[Pixels]) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class SeenRow:
    """A row with its captions by prefix, and its image as an index into the chunk's distinct images."""

    row: Row
    captions: Mapping[str, str]
    image: int


@dataclass(frozen=True)
class PreparedRows:
    """Rows ready for the models: image indices, output rows, captions by row and prefix, and tokens."""

    images: list[int]
    described: list[dict[str, Any]]
    asked: list[tuple[int, str]]
    captions: AskedCaptions
    tokens: list[Any]


@dataclass(frozen=True)
class CaptionScorer:
    """Scores chunks of rows with all scorers. An image has one view per scorer, then the detector's.

    ``stored_safety``: the detector's columns are taken from the row's embeddings.
    """

    scorers: tuple[Scorer | StoredClip, ...]
    safety: SafetyDetector | None = None
    stored_safety: bool = False

    @property
    def preprocesses(self) -> tuple[Preprocess | None, ...]:
        """Preprocessing of each view; None for a stored vector."""
        seen = tuple(scorer.preprocess for scorer in self.scorers)
        return seen if self.safety is None else (*seen, self.safety.preprocess)

    def prepare(self, rows: Sequence[SeenRow]) -> PreparedRows:
        """Work that needs no model: word counts, sentence splitting, tokenization for every scorer."""
        asked = [(number, prefix) for number, seen in enumerate(rows) for prefix in seen.captions]
        captions = ask_captions([(rows[number].image, rows[number].captions[prefix]) for number, prefix in asked])
        texts = list(distinct_texts(captions.pairs))
        described_rows = [{**self._described(seen), "status": str(Status.OK)} for seen in rows]
        tokens = [scorer.tokenize(texts) for scorer in self.scorers]
        return PreparedRows([seen.image for seen in rows], described_rows, asked, captions, tokens)

    def _described(self, seen: SeenRow) -> dict[str, Any]:
        out = described(seen.row, seen.captions)
        if self.stored_safety:
            stored = seen.row.beside[EMBEDDINGS]
            out |= {field.name: stored[field.name] for field in SAFETY}
        return out

    def score(self, rows: PreparedRows, images: Sequence[tuple[Pixels, ...]]) -> list[dict[str, Any]]:
        """Output rows. A NaN or infinite score makes its row an ``engine_error``, to be retried."""
        out = rows.described
        for position, scorer in enumerate(self.scorers):
            pixels = [views[position] for views in images]
            scores = score_asked(scorer, pixels, rows.captions, rows.tokens[position])
            for (number, prefix), score in zip(rows.asked, scores, strict=True):
                _enter(out[number], scorer.name, prefix, score)
        if self.safety is not None:
            labels_by_image = self.safety.detect([views[-1] for views in images])
            for image, row in zip(rows.images, out, strict=True):
                row |= safety_columns(labels_by_image[image])
        return out

    def reason(self, row: SeenRow, image: tuple[Pixels, ...], error: Exception) -> str:
        """Reason why a row cannot be scored even alone: the failing scorer, and whether on the image or a caption."""
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


def safety_columns(labels: Mapping[str, float]) -> dict[str, Any]:
    """Columns for the labels that a safety detector found, with their scores."""
    return {"unsafe": max(labels.values(), default=0.0), "unsafe_labels": sorted(labels)}


def _enter(row: dict[str, Any], scorer: str, prefix: str, score: CaptionScore) -> None:
    if not score.finite:
        reason = f"{scorer} gave no number for {prefix}_caption; score again with --retry, in float32 if it repeats"
        row |= {"status": str(Status.ENGINE_ERROR), "error": reason}
        return
    start = f"{prefix}_{scorer}"
    row[f"{start}_score"], row[f"{start}_score_mean"] = score.score, score.mean
    row[f"{start}_score_min"], row[f"{start}_lowest"] = score.least, score.lowest


def captions_of(row: Row) -> dict[str, str]:
    """Captions of a row by prefix: the new one from its annotate row, and the original, if present."""
    captions = {}
    if CAPTIONS in row.beside and (text := chosen_caption(row.beside[CAPTIONS])).strip():
        captions[NEW] = text
    if row.text is not None and row.text.strip():
        captions[ORIGINAL] = row.text
    return captions


def unscored(row: Row) -> dict[str, Any] | None:
    """Output row if there is nothing to score, or captioning or embedding failed; None otherwise."""
    fate = status_unscored(row)
    return None if fate is None else {**passed_on(row), "status": fate[0], "error": fate[1]}


def status_unscored(row: Row) -> tuple[str, str | None] | None:
    """Status and error of a row with nothing to score, or whose captioning or embedding failed; None otherwise."""
    if row.status is not Status.OK:
        return str(row.status), row.error
    beside = row.beside.get(CAPTIONS)
    for other in (beside, row.beside.get(EMBEDDINGS)):
        if other is not None and other["status"] != Status.OK:
            return other["status"], other["error"]
    wanted = NEW if beside is not None else ORIGINAL
    if wanted in captions_of(row):
        return None
    return str(Status.EMPTY), "the new caption is empty" if beside is not None else "no caption came with the image"


def passed_on(row: Row) -> dict[str, Any]:
    """Output row without scores: the row's own status and error, and its captions."""
    return described(row, captions_of(row))


def described(row: Row, captions: Mapping[str, str]) -> dict[str, Any]:
    """Output row with the columns that need no model."""
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
    """ISO 639-1 code by py3langid (97 languages; Lui and Baldwin, 2012); unreliable for a few words."""
    import py3langid  # deferred: loads its model

    language: str = py3langid.classify(text[:2000])[0]
    return language
