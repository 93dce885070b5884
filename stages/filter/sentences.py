"""Truth of each image's new and original caption, sentence by sentence; thresholds are applied later, by selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.engines.base import ImageInput
from ...models.scorers.sentence_truth import CheckedCaption, check_captions
from ...models.yes_no import YesNoReader
from .score import captions_of, status_unscored


async def check_row(reader: YesNoReader, row: Row, image: ImageInput) -> dict[str, Any]:
    """Output row for a readable image. Raises only EngineDead; a failed request is a status."""
    captions = captions_of(row)
    checked = await check_captions(reader, image, list(captions.values()))
    by_prefix = dict(zip(captions, checked, strict=True))
    columns: dict[str, Any] = {}
    for prefix, caption in by_prefix.items():
        if (summary := caption.summary()) is not None:
            columns[f"{prefix}_vlm_min"], columns[f"{prefix}_vlm_mean"] = summary.least, summary.mean
            columns[f"{prefix}_vlm_lowest"] = summary.lowest
    return {**passed_on(row), **columns, **_fate(by_prefix)}


def _fate(checked: Mapping[str, CheckedCaption]) -> dict[str, Any]:
    """Status and error of a row, where they are not those of its input.

    It is to be retried if a request failed, or if neither caption could be checked. A caption alone with a sentence
    that got no answer would get none again: its columns are null, with the reason, in a row that is ok.
    """
    if error := next((caption.error for caption in checked.values() if caption.error), ""):
        return {"status": str(Status.ENGINE_ERROR), "error": error}
    unanswered = {prefix: caption.unanswered for prefix, caption in checked.items()}
    reasons = "; ".join(f"{prefix}_caption: {reason}" for prefix, reason in unanswered.items() if reason)
    if not reasons or not all(unanswered.values()):
        return {"error": reasons} if reasons else {}
    refused = any(caption.refused for caption in checked.values())
    return {"status": str(Status.REFUSED if refused else Status.ENGINE_ERROR), "error": reasons}


def unchecked(row: Row) -> dict[str, Any] | None:
    """Output row if there is nothing to check, or captioning failed; None otherwise."""
    fate = status_unscored(row)
    if fate is None:
        return None
    status, error = fate
    return {**passed_on(row), "status": status, "error": error}


def passed_on(row: Row) -> dict[str, Any]:
    """Output row of an unchecked one: its own status and error, no probability."""
    return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error}
