"""Provenance of an artifact: its configuration and those of its inputs, as far as they exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.allowed import Allowed
from ...manifests.files.outside import Refused
from ...manifests.files.stores import impatient

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Step:
    """One stage of the chain. ``config`` is None if its artifact is gone or has been replaced; ``note`` says which."""

    name: str  # of its folder, without the path, which would reveal details of a machine
    stage: str
    fingerprint: str | None
    config: dict[str, Any] | None = None
    note: str | None = None


def chain(artifact: Artifact) -> list[Step]:
    """Stages that led to ``artifact``, itself last, each once, in topological order."""
    steps: list[Step] = []
    _walk(artifact, steps, set())
    return steps


def _walk(artifact: Artifact, steps: list[Step], seen: set[str]) -> None:
    seen.add(artifact.fingerprint)
    for role, url, wanted in inputs(artifact.config):
        if wanted in seen:
            continue
        origin = _find(url, wanted, artifact.url)
        if isinstance(origin, Artifact):
            _walk(origin, steps, seen)
        else:
            step = Step(last_part(url), role, wanted, note=origin)
            steps += [step] if step not in steps else []
    steps.append(Step(last_part(artifact.url), artifact.stage, artifact.fingerprint, artifact.config))


def inputs(config: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Inputs in a configuration: role, url, fingerprint (None for tars that are not a capipe artifact).

    A run has the url under its role, and the fingerprint under the same name, or under ``input`` for ``shards``.
    """
    semantic, run = config["semantic"], config["run"]
    for role, url in run.items():
        wanted = semantic.get("input" if role == "shards" else role)
        if not isinstance(url, str):
            continue
        if isinstance(wanted, str) and _FINGERPRINT.fullmatch(wanted):
            yield role, url, wanted
        elif role == "shards":
            yield role, url, None


def _find(url: str, wanted: str | None, beside: str) -> Artifact | str:
    """Artifact with that fingerprint: at its url, or next to its dependent (they may have been moved together)."""
    if wanted is None:
        return "tars that are no artifact of capipe"
    moved = f"{beside.rpartition('/')[0] or '.'}/{last_part(url)}"
    other = refused = False
    for location in dict.fromkeys((url, moved)):
        try:
            with impatient(1.0):
                candidate = Artifact.open(Allowed(beside).place(location))
        except Refused:
            refused = True
            continue
        except (CapipeError, OSError, ImportError, ValueError):  # gone, or in an unreachable store
            continue
        if candidate.fingerprint == wanted:
            return candidate
        other = True
    if refused:
        return "not looked at: in another store than what was made of it"
    return "another artifact is in its place by now" if other else "gone: its folder is not where it was"


def last_part(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or url


def public(value: Any) -> Any:
    """``value`` with every path reduced to its last part, as cards are public."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str) and "\n" not in value and ("://" in value or value.startswith(("/", "~/", "./", "../"))):
        return last_part(value)
    return value
