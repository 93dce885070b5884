"""Truth of captions by sentence as columns: both captions, and no number where a sentence has no answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from capipe.manifests.schema import SENTENCES
from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.models.engines.base import ChoiceRequest, Refused, RequestError
from capipe.models.yes_no import YesNoConfig, YesNoReader, sigmoid
from capipe.stages.filter.score import CAPTIONS
from capipe.stages.filter.sentences import check_row, passed_on, unchecked

from ...scripted import IMAGE, Scripted, options_of

Answer = float | Exception


def row(caption: str | None = "A dog. A cat.", text: str | None = "A bird.", status: str = "ok") -> Row:
    captions = [] if caption is None else [{"name": "dense", "text": caption, "status": status}]
    beside = {CAPTIONS: {"status": status, "error": None, "captions": captions}}
    return Row(0, "k", IMAGE.uid, Status.OK, "a note", b"image", "jpg", text=text, beside=beside)


async def checked(given: Row, believes: Callable[[str], Answer]) -> dict[str, Any]:
    """The output row through the schema. ``believes``: log-odds by the sentence."""

    def scores(request: ChoiceRequest) -> list[float] | Exception:
        odds = believes(request.prompt.text)
        if isinstance(odds, Exception):
            return odds
        yes = options_of(request.prompt)["Yes"]
        return [odds if letter == yes else 0.0 for letter in request.choices]

    out = await check_row(YesNoReader(Scripted(scores), YesNoConfig()), given, IMAGE)
    back: dict[str, Any] = pa.Table.from_pylist([out], schema=SENTENCES).to_pylist()[0]
    assert out.keys() <= back.keys()
    return back


def odds(text: str) -> float:
    return -2.0 if "cat" in text else -1.0 if "bird" in text else -0.5


async def test_both_captions_have_their_least_and_mean_probability() -> None:
    out = await checked(row(), odds)
    assert (out["key"], out["uid"], out["status"], out["error"]) == ("k", IMAGE.uid, "ok", "a note")
    assert out["re_vlm_min"] == pytest.approx(sigmoid(-2.0)) and out["re_vlm_lowest"] == 1
    assert out["re_vlm_mean"] == pytest.approx((sigmoid(-2.0) + sigmoid(-0.5)) / 2)
    assert out["org_vlm_min"] == out["org_vlm_mean"] == pytest.approx(sigmoid(-1.0)) and out["org_vlm_lowest"] == 0
    alone = await checked(row(text=None), odds)
    assert alone["org_vlm_min"] is None and alone["re_vlm_min"] == out["re_vlm_min"]


async def test_a_failed_request_is_to_be_repeated() -> None:
    out = await checked(row(), lambda text: RequestError("reset") if "cat" in text else odds(text))
    assert (out["status"], out["error"], out["re_vlm_min"]) == ("engine_error", "reset", None)


async def test_a_sentence_without_an_answer_leaves_its_caption_without_a_number() -> None:
    out = await checked(row(), lambda text: Refused("I cannot look at cats") if "cat" in text else odds(text))
    assert (out["status"], out["re_vlm_min"], out["re_vlm_lowest"]) == ("ok", None, None)
    assert out["error"] == "re_caption: sentence 2 of 2 has no answer but I cannot look at cats"
    assert out["org_vlm_min"] == pytest.approx(sigmoid(-1.0))
    refused = await checked(row(), lambda text: Refused("no"))
    assert refused["status"] == "refused" and refused["org_vlm_min"] is None
    mumbled = await checked(row(text=None), lambda text: -20.0 if "cat" in text else -21.0)
    assert mumbled["status"] == "ok", "of two letters only the difference counts, as long as one is likely"


async def test_letters_that_nobody_says_are_no_answer() -> None:
    reader = YesNoReader(Scripted(lambda request: [-9.0, -9.0]), YesNoConfig())
    out = await check_row(reader, row(), IMAGE)
    assert out["status"] == "engine_error" and "letters with a probability" in out["error"]


def test_rows_without_a_caption_are_not_asked_about() -> None:
    assert unchecked(row()) is None and unchecked(row(text=None)) is None
    for given, status in ((row(""), "empty"), (row("x", status="degenerate"), "degenerate")):
        out = unchecked(given)
        assert out is not None and out["status"] == status and out.keys() == passed_on(given).keys()
