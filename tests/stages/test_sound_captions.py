"""How many sound captions of text-rich pictures the health gate flags."""

from __future__ import annotations

from capipe.manifests.status import Status
from capipe.stages.health import HealthConfig, examine

from .sound_captions import SOUND_CAPTIONS


def flagged(config: HealthConfig) -> dict[str, str | None]:
    """The reasons against the sound captions that do not pass, by name."""
    verdicts = {name: examine(text, "stop", config) for name, text in SOUND_CAPTIONS.items()}
    return {name: verdict.reason for name, verdict in verdicts.items() if verdict.status is not Status.OK}


def test_few_of_the_held_out_sound_captions_are_flagged() -> None:
    assert len(SOUND_CAPTIONS) == 30
    wrong = flagged(HealthConfig())
    assert len(wrong) <= 30, wrong
