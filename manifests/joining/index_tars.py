"""Indexes: selections without tars, whose manifest names the original tars of their rows."""

from __future__ import annotations

from ...errors import ArtifactMismatch
from ..artifact import Artifact
from ..files.allowed import Allowed, open_place
from ..files.outside import Refused
from .companion import SELECTION


def is_index(artifact: Artifact) -> bool:
    """True if an artifact is a selection without tars."""
    options = artifact.config["semantic"].get("select")
    return artifact.stage == SELECTION and isinstance(options, dict) and options.get("index") is True


def tar_location(index: str, url: object, allowed: Allowed) -> str:
    """Where a tar of the index at the URL ``index`` is: at ``url``, its place in the manifest, or in a folder that the
    user named.

    Raises ArtifactMismatch if it is nowhere, or where nothing is opened that only a manifest names.
    """
    try:
        location = allowed.place(url)
        for place in (location, *allowed.elsewhere(location)):
            try:
                with open_place(place):
                    return place
            except OSError as error:
                missing = error
    except Refused as error:
        raise ArtifactMismatch(f"{index}: an index over tars elsewhere: {error}") from None
    text = f"{location}: cannot be read ({missing}), and {index} is an index over it"
    raise ArtifactMismatch(f"{text}; restore it, or name its folder by --images")
