"""Fingerprints: hashes of the settings that determine an artifact's rows.

A fingerprint covers what changes a row's content (model, prompt, sampling, pixel cap, thresholds, input, schema) and
nothing that only changes speed (batch sizes, workers, devices).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .schema import SCHEMA_VERSION


def fingerprint(semantic: Mapping[str, Any]) -> str:
    """sha256 (hex) over the canonical JSON of ``semantic`` and the schema version."""
    return hashlib.sha256(canonical({**semantic, "schema_version": SCHEMA_VERSION}).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Raises TypeError for non-JSON values."""
    return encodable(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def encodable(text: str) -> str:
    """JSON text that can be encoded as UTF-8: file names that are not UTF-8 are escaped, and read back unchanged."""
    return text.encode("utf-8", "backslashreplace").decode()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable ``key: old -> new`` entries for every leaf that differs between two configurations."""
    changes: list[str] = []
    for key in sorted({*old, *new}):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += differences(before, after, f"{name}.")
        elif before != after:
            changes.append(f"{name}: {_short(before)} -> {_short(after)}")
    return changes


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"
