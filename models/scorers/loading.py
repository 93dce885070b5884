"""Scorers by name: resolving and loading their models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from .base import Scorer


@dataclass(frozen=True)
class ScorerConfig:
    """A scorer as given by options. ``kind``: clip or itm; ``model``: bundled, a folder or a name of its library."""

    kind: str
    model: str
    dtype: str = "auto"
    device: str = "auto"


def load_scorer(config: ScorerConfig) -> Scorer:
    """Load the model. Raises BadInput for one that does not exist or is of another kind."""
    if config.kind == "clip":
        from .clip import load_clip

        return load_clip(config.model, config.dtype, config.device)
    if config.kind == "itm":
        from .itm import load_itm

        return load_itm(config.model, config.dtype, config.device)
    raise BadInput(f"scorer {config.kind!r} is neither clip nor itm")


def scorer_identity(config: ScorerConfig) -> dict[str, Any]:
    """What fingerprints cover: the weights' digest (or the library's name), dtype, activation and preprocessing.

    Besides clip and itm it knows blip, which is a reward only. Raises BadInput.
    """
    from ..engines.model_folder import content_digest
    from .clip_source import Tag, clip_source
    from .itm import retrieval_source

    if config.kind == "clip":
        clip = clip_source(config.model)
        tag = clip.place
        model = f"{tag.architecture}|{tag.pretrained}" if isinstance(tag, Tag) else content_digest(tag)
        return {"model": model, "dtype": config.dtype, **clip.seen_as()}
    source = retrieval_source(config.model, ("blip",) if config.kind == "blip" else ("blip", "blip-2"))
    return {"model": content_digest(source.folder), "dtype": config.dtype, **source.seen_as()}
