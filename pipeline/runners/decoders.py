"""Number of image decoding processes beside an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

MOST = 16
AUTO = -1  # in a stage's setup: as many as the machine has room for on which a worker runs, not yet known

AnyStage = TypeVar("AnyStage")


def decoders_of(cores: int, engines: int) -> int:
    """Decoding processes per engine: the cores divided among engines, minus one for each engine, at most MOST."""
    return max(1, min(MOST, cores // max(1, engines) - 1))


def settled(stage: AnyStage, decoders: int) -> AnyStage:
    """The stage with so many decoding processes, if its setup leaves the number to the machine."""
    setup: Any = getattr(stage, "setup", None)
    if getattr(setup, "decode_workers", None) != AUTO:
        return stage
    changed: Any = stage
    settled_stage: AnyStage = replace(changed, setup=replace(setup, decode_workers=decoders))
    return settled_stage
