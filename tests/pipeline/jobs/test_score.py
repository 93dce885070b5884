"""The scoring stage's processor: a row on which a scorer fails costs its neighbours nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capipe.errors import BadInput
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.images.decode import Pixels
from capipe.models.images.preprocess import Preprocess
from capipe.models.scorers.base import Pair
from capipe.models.scorers.loading import ScorerConfig
from capipe.models.scorers.stored import ROUNDING
from capipe.pipeline.jobs import score as scoring
from capipe.pipeline.jobs.score import EmbedProcessor, ScoreProcessor, ScoreSetup, StoredImages
from capipe.stages.filter.score import CAPTIONS, EMBEDDINGS

from ...conftest import photo

DARK = photo(99)


class Delicate:
    """Scores a text by its length; fails on a batch with a text that says so, and on images that are asked to."""

    name = "clip"
    preprocess = Preprocess(8, 8)
    width = 1

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.fails_on: Pixels | None = None
        self.error: Exception = IndexError("index out of range in self")

    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        self.batches.append(len(pixels))
        if self.fails_on is not None and any((each == self.fails_on).all() for each in pixels):
            raise self.error
        return torch.tensor([[float(each.mean())] for each in pixels])

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        if any("untokenizable" in text for text in texts):
            raise ValueError("no tokens of this")
        return list(texts)

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Any = None) -> list[float]:
        if any("poison" in pair.text for pair in pairs):
            raise self.error
        return [len(pair.text) + float(images[pair.image, 0]) / 256 for pair in pairs]


@pytest.fixture
def delicate(monkeypatch: pytest.MonkeyPatch) -> Delicate:
    made = Delicate()
    monkeypatch.setattr(scoring, "load_scorer", lambda config: made)
    monkeypatch.setattr(scoring, "load_clip", lambda *named: made)
    return made


SETUP = ScoreSetup((ScorerConfig("clip", "none", device="cpu"),), decode_workers=1)


@pytest.fixture
async def processor(delicate: Delicate) -> AsyncIterator[ScoreProcessor]:
    made = ScoreProcessor(SETUP)
    yield made
    await made.aclose()


def row(index: int, text: str, caption: str = "A dog.", image: bytes | None = None) -> Row:
    beside = {CAPTIONS: {"status": "ok", "error": None, "captions": [{"text": caption, "status": "ok"}]}}
    data = photo(index // 2) if image is None else image  # two rows show one image
    return Row(index, f"{index:03}", f"{hash(data):x}", Status.OK, image=data, text=text, beside=beside)


def scores(rows: Sequence[dict[str, Any]]) -> list[Any]:
    return [(each["status"], each.get("re_clip_score"), each.get("org_clip_score")) for each in rows]


@pytest.mark.parametrize("bad", ["poison", "untokenizable"])
async def test_a_text_that_a_scorer_cannot_read_costs_its_row_alone(
    processor: ScoreProcessor, delicate: Delicate, bad: str
) -> None:
    texts = [f"A cat, the {n}th." for n in range(13)]
    usual = await processor.process([row(n, text) for n, text in enumerate(texts)])
    assert delicate.batches == [7] and {each["status"] for each in usual} == {"ok"}
    for at in (0, 5, 12):
        out = await processor.process([row(n, f"A {bad}." if n == at else text) for n, text in enumerate(texts)])
        assert scores(out[:at] + out[at + 1 :]) == scores(usual[:at] + usual[at + 1 :])
        assert out[at]["status"] == "engine_error" and out[at]["org_caption"] == f"A {bad}."
        assert (
            out[at]["error"]
            == {
                "poison": "clip cannot score org_caption: IndexError: index out of range in self",
                "untokenizable": "clip cannot score org_caption: ValueError: no tokens of this",
            }[bad]
        )


async def test_the_new_caption_is_named_and_several_rows_may_fail(processor: ScoreProcessor) -> None:
    rows = [row(n, "A cat.", "A poison." if n in (1, 2, 6) else "A dog.") for n in range(8)]
    out = await processor.process(rows)
    assert [n for n, each in enumerate(out) if each["status"] == "engine_error"] == [1, 2, 6]
    assert all("clip cannot score re_caption" in out[n]["error"] for n in (1, 2, 6))


async def test_an_image_that_a_scorer_cannot_see_costs_its_row_alone(
    processor: ScoreProcessor, delicate: Delicate
) -> None:
    from capipe.models.images.decode import ImageLimits
    from capipe.models.images.preprocess import decode_preprocessed

    views = decode_preprocessed(DARK, preprocesses=(delicate.preprocess,), limits=ImageLimits())
    assert isinstance(views, tuple)
    delicate.fails_on = views[0]
    rows = [row(n, "A cat.", image=DARK if n == 3 else None) for n in range(6)]
    out = await processor.process(rows)
    assert [each["status"] for each in out] == ["ok"] * 3 + ["engine_error"] + ["ok"] * 2
    assert out[3]["error"].startswith("clip cannot score the image: IndexError")
    embedder = EmbedProcessor(SETUP)
    try:
        out = await embedder.process(rows)
    finally:
        await embedder.aclose()
    assert [each["status"] for each in out] == ["ok"] * 3 + ["engine_error"] + ["ok"] * 2
    assert out[3]["error"] == "IndexError: index out of range in self" and "image_embedding" in out[2]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), torch.AcceleratorError("a fault")])
async def test_a_devices_fault_is_nobodys_row(processor: ScoreProcessor, delicate: Delicate, error: Exception) -> None:
    delicate.error = error
    with pytest.raises(type(error)):
        await processor.process([row(n, "A poison." if n == 3 else "A cat.") for n in range(6)])
    assert delicate.batches == [3]


def stored(index: int, vector: list[float] | None, **more: Any) -> Row:
    """A row with its embedding beside it, and an image that nobody can decode."""
    made = row(index, "A cat.", image=b"no image %d" % index)
    array = None if vector is None else np.array(vector, dtype=np.float16)
    made.beside[EMBEDDINGS] = {"status": "ok", "error": None, "image_embedding": array, **more}
    return made


class Texts:
    """The text side of a CLIP of width 2: long captions to one axis, short ones to the other."""

    name, preprocess, width, device = "clip", Preprocess(8, 8), 2, torch.device("cpu")

    def encode_images(self, pixels: Sequence[Pixels]) -> Tensor:
        raise AssertionError("the vision encoder saw an image")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0] if len(text) > 6 else [0.0, 1.0] for text in texts])

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def score(self, images: Tensor, pairs: Sequence[Pair], tokens: Any = None) -> list[float]:
        return [float(images[pair.image] @ self.encode_texts([pair.text])[0]) for pair in pairs]


async def processed(setup: ScoreSetup, rows: Sequence[Row]) -> list[dict[str, Any]]:
    made = ScoreProcessor(setup)
    try:
        return await made.process(rows)
    finally:
        await made.aclose()


async def test_stored_embeddings_are_scored_without_a_look_at_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "load_clip", lambda *named: Texts())
    rows = [stored(0, [0.6, 0.8]), stored(1, [0.0, 1.0]), stored(2, None), stored(3, [3.0, 4.0]), stored(4, [1.0])]
    rows.append(stored(5, None, status="corrupt"))
    out = await processed(replace(SETUP, stored=StoredImages(2, safety=False)), rows)
    assert [each["status"] for each in out] == ["ok", "ok", *["engine_error"] * 3, "corrupt"]
    assert out[0]["org_clip_score"] == pytest.approx(0.8, abs=ROUNDING) and out[1]["org_clip_score"] == 1.0
    assert "it has no embedding; run `capipe embed` again with --retry" in out[2]["error"]
    assert "its embedding is no unit vector; embed it again" in out[3]["error"]
    assert "its embedding has 1 numbers, not 2; embed it again" in out[4]["error"]
    with pytest.raises(BadInput, match="--embeddings: of 8 numbers each, and none has 2; embed the images again"):
        ScoreProcessor(replace(SETUP, stored=StoredImages(8, safety=False)))


class Detector:
    preprocess = Preprocess(4, 4)

    def detect(self, pixels: Sequence[Pixels]) -> list[dict[str, float]]:
        return [{"B": 0.25, "A": 0.5} for _ in pixels]


async def test_safety_is_looked_for_once(delicate: Delicate, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `embed`, and by `filter` where `embed` did not; the same columns, from whichever looked."""
    monkeypatch.setattr(scoring, "_detector", Detector)
    embedder = EmbedProcessor(replace(SETUP, safety=True))
    try:
        (made,) = await embedder.process([row(0, "A cat.")])
    finally:
        await embedder.aclose()
    assert embedder.schema.names[-2:] == ["unsafe", "unsafe_labels"]
    found = {"unsafe": 0.5, "unsafe_labels": ["A", "B"]}
    assert {name: made[name] for name in found} == found
    (plain,) = await processed(replace(SETUP, safety=True), [row(0, "A cat.")])
    assert {name: plain[name] for name in found} == found

    monkeypatch.setattr(scoring, "load_clip", lambda *named: Texts())
    own = replace(SETUP, safety=True, stored=StoredImages(2, safety=False))  # embed did not look: filter does
    seen = row(0, "A cat.")
    seen.beside[EMBEDDINGS] = stored(0, [1.0, 0.0]).beside[EMBEDDINGS]
    (out,) = await processed(own, [seen])
    assert {name: out[name] for name in found} == found and out["status"] == "ok"

    def nobody() -> Detector:
        raise AssertionError("a detector was loaded")

    monkeypatch.setattr(scoring, "_detector", nobody)
    taken = {"unsafe": 0.75, "unsafe_labels": ["X"]}
    both = replace(own, stored=StoredImages(2, safety=True))
    (out,) = await processed(both, [stored(0, [1.0, 0.0], **taken)])
    assert {name: out[name] for name in taken} == taken and out["status"] == "ok"
