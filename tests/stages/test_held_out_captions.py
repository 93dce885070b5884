"""The health gate on texts that its rules and thresholds were never tuned on, all written before the rules were.

``sound_captions.txt``: thirty captions of tables, forms, receipts, code, formulas and lists in eight languages;
``degenerate_captions.py``: loops and refusals. The bounds are the figures reached, not aims: lower them, and leave the
texts as they are.
"""

from __future__ import annotations

from capipe.manifests.status import Status
from capipe.stages.health import HealthConfig, examine

from .caption_texts import caption_texts
from .degenerate_captions import LOOPS, REFUSALS


def mistaken(texts: dict[str, str], right: Status) -> dict[str, str | None]:
    """The texts whose verdict is another than ``right``, with the reason given."""
    verdicts = {name: examine(text, "stop", HealthConfig()) for name, text in texts.items()}
    return {name: verdict.reason for name, verdict in verdicts.items() if verdict.status is not right}


def test_how_many_sound_captions_of_text_rich_pictures_are_flagged() -> None:
    texts = caption_texts("sound_captions")
    assert len(texts) == 30
    wrong = mistaken(texts, Status.OK)
    assert len(wrong) <= 0, wrong


def test_how_many_loops_are_missed() -> None:
    """The two are lists that go on counting, which a caption of a full shelf does, too."""
    missed = mistaken(LOOPS, Status.DEGENERATE)
    assert len(missed) <= 2, missed


def test_how_many_refusals_are_missed() -> None:
    missed = mistaken(REFUSALS, Status.REFUSED)
    assert len(missed) <= 0, missed
