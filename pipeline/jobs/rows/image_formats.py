"""Image formats that a stage takes of its shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from ....manifests.shards import InputShard
from ....models.images.decode import EVERYTHING, ImageLimits

Described = TypeVar("Described")


def accepting(stage: Described, shards: Iterable[InputShard]) -> Described:
    """A stage (a dataclass, with limits of images in its ``setup``) that takes what `ingest` took.

    Of tars by others it takes the common formats alone: the further decoders only run where somebody asked for them.
    """
    described: Any = stage
    setup: Any = getattr(described, "setup", None)
    limits = getattr(setup, "limits", None)
    if not isinstance(limits, ImageLimits) or any(shard.record is None for shard in shards):
        return stage
    changed: Described = replace(described, setup=replace(setup, limits=replace(limits, accept=EVERYTHING)))
    return changed
