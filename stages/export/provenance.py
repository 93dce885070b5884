"""Where an artifact comes from: its own configuration and its inputs', as far as they are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.allowed import Allowed
from ...manifests.files.outside import Refused

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Step:
    """One stage of the chain. ``config`` is None where its artifact is gone or another one by now; ``note`` says so."""

    name: str  # of its folder, without the path, which would tell of somebody's machine
    stage: str
    fingerprint: str | None
    config: dict[str, Any] | None = None
    note: str | None = None


def chain(artifact: Artifact) -> list[Step]:
    """The stages that led to ``artifact``, itself last, each once, inputs before what was made of them."""
    steps: list[Step] = []
    _walk(artifact, steps, set())
    return steps


def _walk(artifact: Artifact, steps: list[Step], seen: set[str]) -> None:
    seen.add(artifact.fingerprint)
    for role, url, wanted in inputs(artifact.config):
        if wanted in seen:
            continue
        found = _find(url, wanted, artifact.url)
        if isinstance(found, Artifact):
            _walk(found, steps, seen)
        else:
            step = Step(last_part(url), role, wanted, note=found)
            steps += [step] if step not in steps else []
    steps.append(Step(last_part(artifact.url), artifact.stage, artifact.fingerprint, artifact.config))


def inputs(config: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """What a configuration says it was made of: role, url, fingerprint (None for tars that are no artifact of ours).

    A run notes the url under a role, and the fingerprint under the same name, but for ``shards``: those are ``input``.
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
    """The artifact of that fingerprint: where it was, or beside the one made of it (they may have moved together)."""
    if wanted is None:
        return "tars that are no artifact of capipe"
    moved = f"{beside.rpartition('/')[0] or '.'}/{last_part(url)}"
    other = refused = False
    for place in dict.fromkeys((url, moved)):
        try:
            found = Artifact.open(Allowed(beside).place(place))
        except Refused:
            refused = True
            continue
        except (CapipeError, OSError, ImportError, ValueError):  # gone, or in a store that is out of reach
            continue
        if found.fingerprint == wanted:
            return found
        other = True
    if refused:
        return "not looked at: in another store than what was made of it"
    return "another artifact is in its place by now" if other else "gone: its folder is not where it was"


def last_part(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or url


def public(value: Any) -> Any:
    """``value`` with every path in it cut down to its last part: a card is read by strangers."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str) and "\n" not in value and ("://" in value or value.startswith(("/", "~/", "./", "../"))):
        return last_part(value)
    return value
