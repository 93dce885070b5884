"""JSON files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..manifests.files import bounded_json


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises BadInput."""
    try:
        content = bounded_json.load(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no JSON object")
    return content
