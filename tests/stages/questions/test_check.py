"""Captions of an evaluation, checked by sentence: which are, with which controls, and what has no answer."""

from __future__ import annotations

from random import Random
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import CHECKED
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import RequestError
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.scenes import Scene, Sign, Thing
from capipe.models.yes_no import YesNoConfig, YesNoReader, sigmoid
from capipe.stages.questions.check import CaptionChecker, CheckConfig, passed_on, subjects_of
from capipe.stages.questions.grade import GradeConfig

from ...oracle.scene_engine import SURE, UNLIKELY, SceneEngine
from ...scripted import IMAGE, Scripted

SCENE = Scene("gray", (Thing("center", "star", "blue", "large"),), Sign("EXIT", "top left"))
TRUE = sigmoid(SURE - UNLIKELY)
SAID = [("plain#0", "A blue star. A red star."), ("plain#1", ""), ("lost", None)]


def row(scene: Scene | None = SCENE) -> Row:
    captions = [
        {"name": name, "text": text, "n_tokens": 1, "status": "engine_error" if text is None else "ok"}
        for name, text in SAID
    ]
    meta = None if scene is None else {"scene": scene.to_dict()}
    beside = {"captions": {"status": "ok", "error": None, "captions": captions}}
    return Row(0, "k", IMAGE.uid, Status.OK, None, b"image", "jpg", meta=meta, beside=beside)


async def checked(engine: Any, given: Row, **config: Any) -> dict[str, Any]:
    checker = CaptionChecker(YesNoReader(engine, YesNoConfig()), CheckConfig(**config))
    out = await checker.check(given, IMAGE)
    back: dict[str, Any] = pa.Table.from_pylist([out], schema=CHECKED).to_pylist()[0]
    return back


async def test_captions_and_the_controls_that_state_something_are_checked() -> None:
    out = await checked(SceneEngine({IMAGE.uid: SCENE}), row())
    sentences = {caption["name"]: caption["sentences"] for caption in out["captions"]}
    assert list(sentences) == ["plain#0", "oracle", "generic"] and out["status"] == "ok"
    assert sentences["plain#0"] == pytest.approx([TRUE, 1 - TRUE]) and min(sentences["oracle"]) == pytest.approx(TRUE)
    oracle = next(caption["text"] for caption in out["captions"] if caption["name"] == "oracle")
    assert oracle == dense_caption(SCENE, Random(f"oracle:{IMAGE.uid}")), "the caption that is graded as the oracle"
    without = await checked(SceneEngine({IMAGE.uid: SCENE}), row(), controls=GradeConfig(controls=False))
    assert [caption["name"] for caption in without["captions"]] == ["plain#0"]
    photo = await checked(SceneEngine({IMAGE.uid: SCENE}), row(None))
    assert [caption["name"] for caption in photo["captions"]] == ["plain#0", "generic"]


async def test_a_failed_request_is_to_be_repeated_and_a_missing_answer_is_null() -> None:
    failed = await checked(Scripted(lambda request: RequestError("reset")), row())
    assert (failed["status"], failed["error"]) == ("engine_error", "reset")

    def silent_of_stars(request: Any) -> list[float]:
        return [-9.0, -9.0] if "blue star" in request.prompt.text else [-0.1, -3.0]

    out = await checked(Scripted(silent_of_stars), row(), controls=GradeConfig(controls=False))
    assert out["status"] == "ok" and "sentence 1 of 2 has no answer" in out["error"]
    (caption,) = out["captions"]
    assert caption["sentences"][0] is None and caption["sentences"][1] is not None


def test_a_row_without_statements_is_passed_on() -> None:
    config = GradeConfig(controls=False)
    empty = Row(0, "k", IMAGE.uid, Status.OK, None, b"", "jpg", beside={"captions": {"captions": None}})
    assert subjects_of(empty, config) == [] and passed_on(empty)["captions"] == []


def test_the_fingerprint_has_the_generic_caption_only_if_it_is_checked() -> None:
    with_controls, without = CheckConfig(), CheckConfig(controls=GradeConfig(controls=False))
    assert with_controls.semantic()["generic"] and without.semantic()["generic"] is None
