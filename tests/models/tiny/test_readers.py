"""The bundled readers really read: measured on held-out scenes by :mod:`capipe.models.tiny.train.eval.reader`."""

from __future__ import annotations

import pytest

from capipe.models.tiny.train.eval.reader import report


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny/reader", "tiny/holdout-reader"])
async def test_a_reader_answers_from_the_caption_and_from_nothing_else(model: str) -> None:
    found = await report(model, 60)
    assert found.dense >= 0.94 and found.retold >= 0.9 and found.deleted >= 0.88
    assert max(found.empty, found.generic, found.blind, found.injected) <= 0.05
    assert max(found.by_place) - min(found.by_place) <= 0.05
