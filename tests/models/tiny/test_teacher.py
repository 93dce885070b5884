"""The bundled teacher knows what is there, and which statements are true: measured on held-out scenes."""

from __future__ import annotations

import pytest

from capipe.models.tiny.train.eval.yes_no import yes_no_report


@pytest.mark.slow
async def test_the_teacher_says_yes_and_no_to_what_is_so_and_what_is_not() -> None:
    found = await yes_no_report("tiny/teacher", 60, seed=5)
    assert found.unanswered == 0
    assert found.questions >= 0.95 and found.sentences >= 0.93 and found.least >= 0.9 and found.lowest >= 0.8
