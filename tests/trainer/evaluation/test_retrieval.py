"""Recall at k against its definition, and captions that find their image or fit everything."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch

from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.images.decode import ImageLimits
from capipe.models.images.preprocess import decode_preprocessed
from capipe.models.scorers.base import Pair
from capipe.models.scorers.clip import load_clip
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.corpus import samples
from capipe.models.tiny.world.scenes import Scene, Thing
from capipe.trainer.evaluation.bootstrap import found_at
from capipe.trainer.evaluation.evaluate import evaluate
from capipe.trainer.evaluation.results import EvaluationReport
from capipe.trainer.evaluation.retrieval import cosines_of, gallery_of, ranks, ranks_of
from capipe.trainer.evaluation.tables import to_markdown

from ..grading import caption, question, row


def test_ranks_are_places_in_the_sorted_gallery() -> None:
    rng = np.random.default_rng(0)
    similarity = torch.from_numpy(rng.normal(size=(40, 30)))
    own = torch.from_numpy(rng.integers(0, 30, 40))
    expected = [sorted(line.tolist(), reverse=True).index(line[o]) + 1 for line, o in zip(similarity, own, strict=True)]
    assert ranks(similarity, own) == expected


def test_a_caption_that_fits_everything_finds_nothing() -> None:
    assert ranks(torch.ones(1, 20), torch.tensor([3])) == [20]
    assert found_at(1) == {1: True, 5: True, 10: True} and found_at(6) == {1: False, 5: False, 10: True}


def test_a_clip_finds_scenes_by_dense_captions_and_not_by_empty_ones() -> None:
    shown = list(samples(60, "heldout", seed=21))
    rows = [
        Row(number, each.key, f"{number:032x}", Status.OK, image=each.image, format="jpg")
        for number, each in enumerate(
            [*shown, shown[0]]
        )  # one of them twice: the last has another uid, and is left out
    ]
    wanted = {row.uid for row in rows[:60] if row.uid}
    clip = load_clip("tiny/clip")
    gallery = gallery_of(iter([*rows, rows[0]]), wanted, clip)
    assert list(gallery.names) == [row.uid for row in rows[:60]]
    dense = [(row.uid or "", dense_caption(each.scene, Random(1))) for row, each in zip(rows, shown, strict=False)]
    found = ranks_of(gallery, [*dense, (dense[0][0], ""), ("nobody", "A dog.")], clip)
    assert sum(found[pair] <= 10 for pair in dense) > 45
    assert ("nobody", "A dog.") not in found and (dense[0][0], "") in found
    cosines = cosines_of(gallery, [*dense, ("nobody", "A dog.")], clip)
    features = clip.encode_images(
        [decode_preprocessed(shown[3].image, preprocesses=(clip.preprocess,), limits=ImageLimits())[0]]
    )
    assert cosines[dense[3]] == pytest.approx(clip.score(features, [Pair(0, dense[3][1])])[0], abs=1e-5)
    assert cosines.keys() == set(dense)


def test_the_report_has_recall_by_system_and_comes_back_from_json() -> None:
    scene = Scene("white", (Thing("top left", "circle", "red", "large"),))
    graded = [
        row(
            key,
            [question("q")],
            [caption("plain", f"caption {key}", {"q": [0]}), caption("blind", None, {"q": [0]})],
            scene,
        )
        for key in ("a", "b")
    ]
    found = {(graded[0]["uid"], "caption a"): 1, (graded[1]["uid"], "caption b"): 7}
    report = evaluate(graded, {}, ranks=found, gallery=9, resamples=20)
    plain, blind = report.systems
    assert plain.retrieval is not None and blind.retrieval is None
    assert {k: each.value for k, each in plain.retrieval.recall.items()} == {1: 0.5, 5: 0.5, 10: 1.0}
    assert (plain.retrieval.gallery, plain.retrieval.captions) == (9, 2)
    assert EvaluationReport.from_dict(report.to_dict()) == report
    assert "recall@10 %" in to_markdown(report)
    assert "Retrieval" not in to_markdown(evaluate(graded, {}, resamples=20))


def test_the_report_has_cosines_and_perplexity_of_those_captions_that_were_judged() -> None:
    graded = [row(key, [question("q")], [caption("plain", f"caption {key}", {"q": [0]})]) for key in ("a", "b")]
    cosines = {(graded[0]["uid"], "caption a"): 0.25, (graded[1]["uid"], "caption b"): 0.75}
    logps = {"caption a": [-1.0, -3.0], "caption b": [-2.0]}
    report = evaluate(graded, {}, cosines=cosines, logps=logps, resamples=20)
    judged = report.systems[0].judged
    assert judged is not None and judged.cosine.value == 0.5 and judged.logp.value == -2.0
    assert judged.logp.n == 3  # a mean over tokens, not over captions
    assert EvaluationReport.from_dict(report.to_dict()) == report
    assert f"{math.exp(2):.2f}" in to_markdown(report) and "Other models" in to_markdown(report)
    assert evaluate(graded, {}, resamples=20).systems[0].judged is None
