"""The health gate on texts that no threshold is tuned on, all written before its rules were.

``sound_captions.txt``: thirty captions of tables, forms, receipts, code, formulas and lists in eight languages;
``degenerate_captions.py``: loops and refusals. The bounds are the figures reached, not aims: lower them, and leave the
texts as they are. With the rules of before they were 19, 14 and 16. One sound caption, a stack trace, showed that long
words had come to count as several; that they count as one again is the only change made after a look at these texts.
"""

from __future__ import annotations

from capipe.manifests.status import Status
from capipe.stages.annotate.quality_gate import QualityGateConfig, check_caption

from ..caption_texts import caption_texts
from ..degenerate_captions import LOOPS, REFUSALS


def mistaken(texts: dict[str, str], right: Status) -> dict[str, str | None]:
    """The texts whose verdict is another than ``right``, with the reason given."""
    verdicts = {name: check_caption(text, "stop", QualityGateConfig()) for name, text in texts.items()}
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
