"""Scoring rows: what is scored, what is passed on, and what a scorer's failure does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.images.decode import Pixels
from capipe.models.images.preprocess import Preprocess
from capipe.models.scorers.base import Pair
from capipe.stages.filter.score import CAPTIONS, CaptionScorer, SeenRow, captions_of, language_of, passed_on, unscored


class LengthScorer:
    """Scores a text by its length and its image's first level; counts what it is asked."""

    name = "clip"
    preprocess = Preprocess(8, 8)

    def __init__(self, bad: str = "") -> None:
        self.bad, self.encoded, self.asked = bad, 0, 0

    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        self.encoded += len(pixels)
        return torch.tensor([float(each[0, 0, 0]) for each in pixels])

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Any = None) -> list[float]:
        assert tokens == list(dict.fromkeys(pair.text for pair in pairs))
        self.asked += len(pairs)
        return [
            math.nan if self.bad and self.bad in each.text else len(each.text) + float(images[each.image])
            for each in pairs
        ]


def row(index: int, text: str | None = "A dog. A small cat.", caption: str | None = None, **more: Any) -> Row:
    beside: dict[str, dict[str, Any]] = {}
    if caption is not None:
        beside[CAPTIONS] = {"status": "ok", "error": None, "captions": [{"text": caption, "status": "ok"}]}
    return Row(index, f"{index:03}", f"{index:032x}", Status.OK, image=b"", text=text, beside=beside, **more)


def image(level: int) -> tuple[Pixels, ...]:
    return (np.full((8, 8, 3), level, dtype=np.uint8),)


def scored(rows: Sequence[Row], scorer: LengthScorer | None = None) -> list[dict[str, Any]]:
    seen = [SeenRow(each, captions_of(each), number) for number, each in enumerate(rows)]
    captions = CaptionScorer((scorer or LengthScorer(),))
    return captions.score(captions.prepare(seen), [image(number) for number in range(len(rows))])


def test_both_captions_are_scored_whole_and_by_sentence() -> None:
    (out,) = scored([row(0, "A dog. A small cat.", "A large dog. It is red. Red it is.")])
    assert out["status"] == "ok"
    assert out["org_clip_score"] == len("A dog. A small cat.")
    assert (out["org_clip_score_min"], out["org_clip_lowest"]) == (6, 0)
    assert out["org_clip_score_mean"] == (6 + 12) / 2
    assert (out["re_clip_score_min"], out["re_clip_lowest"], out["re_sentences"]) == (10, 1, 3)
    assert (out["re_length"], out["org_length"], out["re_language"]) == (9, 5, "en")
    assert out["re_caption"] == "A large dog. It is red. Red it is."


def test_an_image_is_encoded_once_for_all_its_captions() -> None:
    scorer = LengthScorer()
    rows = [row(0, "A dog.", "A large dog."), row(1, "A dog.", "A large dog.")]
    seen = [SeenRow(each, captions_of(each), 0) for each in rows]  # two rows of one image
    captions = CaptionScorer((scorer,))
    captions.score(captions.prepare(seen), [image(0)])
    assert (scorer.encoded, scorer.asked) == (1, 2)  # a one-sentence caption is its only sentence


def test_a_score_that_is_no_number_is_an_error_of_its_row_alone() -> None:
    out = scored([row(0), row(1, caption="A cursed dog."), row(2)], LengthScorer(bad="cursed"))
    assert [each["status"] for each in out] == ["ok", "engine_error", "ok"]
    assert "clip" in out[1]["error"] and "--retry" in out[1]["error"]
    assert not Status(out[1]["status"]).resolved
    assert "re_clip_score" not in out[1] and out[1]["re_caption"] == "A cursed dog."


def test_a_caption_of_five_thousand_words_is_scored() -> None:
    text = " ".join(f"There is a dog at place {number}." for number in range(800))
    (out,) = scored([row(0, caption=text)])
    assert out["status"] == "ok" and out["re_sentences"] == 800 and out["re_length"] == 800 * 7
    assert out["re_repetition"] > 0.3


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        (row(0, caption=""), "empty", "the new caption is empty"),
        (row(0, caption="  \n"), "empty", "the new caption is empty"),
        (row(0, None), "empty", "no caption came with the image"),
        (row(0, " "), "empty", "no caption came with the image"),
        (Row(0, "0", None, Status.CORRUPT, "truncated"), "corrupt", "truncated"),
    ],
)
def test_what_cannot_be_scored_is_passed_on_with_its_reason(given: Row, status: str, reason: str) -> None:
    out = unscored(given)
    assert out is not None and (out["status"], out["error"]) == (status, reason)


def test_a_row_whose_captioning_failed_keeps_that_status_and_its_original_text() -> None:
    given = row(0)
    given.beside[CAPTIONS] = {"status": "degenerate", "error": "loops", "captions": []}
    out = unscored(given)
    assert out is not None and (out["status"], out["error"]) == ("degenerate", "loops")
    assert out["org_caption"] == "A dog. A small cat."


def test_a_row_that_can_be_scored_is_not_passed_on() -> None:
    assert unscored(row(0)) is None and unscored(row(0, None, "A dog.")) is None


def test_a_note_survives() -> None:
    given = row(0)
    given.error = "text is not UTF-8"
    assert passed_on(given)["error"] == "text is not UTF-8"
    assert scored([given])[0]["error"] == "text is not UTF-8"


def test_languages_are_told_apart() -> None:
    assert language_of("There are two shapes on a brown background.") == "en"
    assert language_of("Auf dem Bild sind zwei Formen vor einem braunen Hintergrund zu sehen.") == "de"
    assert language_of("Il y a deux formes sur un fond brun, et un grand cercle rouge.") == "fr"
