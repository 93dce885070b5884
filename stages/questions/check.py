"""Captions of an evaluation, checked sentence by sentence against the image by a vision-language model.

Of the control captions the oracle, where the image has its scene, and the generic one make statements: what the model
says of the former is its ceiling, and of the latter what a caption of any image gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.engines.base import ImageInput
from ...models.scorers.sentence_truth import CheckedCaption, check_captions
from ...models.yes_no import CHECK, YesNoConfig, YesNoReader
from .grade import CAPTIONS, GradeConfig, Subject, captions_of, controls

CHECKED_CONTROLS = ("oracle", "generic")


class CheckConfig(BaseModel):
    """How captions are checked, and which controls beside them. All of it is in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reader: YesNoConfig = YesNoConfig()
    controls: GradeConfig = GradeConfig()

    def semantic(self) -> dict[str, Any]:
        """Settings covered by the fingerprint; of the controls those that are checked."""
        generic = self.controls.generic if self.controls.controls else None
        return {"question": CHECK, "generic": generic, **self.reader.model_dump(mode="json")}


@dataclass(frozen=True)
class CaptionChecker:
    """Checks the captions of rows."""

    reader: YesNoReader
    config: CheckConfig

    async def check(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """Output row for a readable image. Raises only EngineDead; a failed request is a status."""
        subjects = subjects_of(row, self.config.controls)
        checked = await check_captions(self.reader, image, [subject.text or "" for subject in subjects])
        captions = [
            {"name": subject.name, "text": subject.text, "sentences": caption.probabilities}
            for subject, caption in zip(subjects, checked, strict=True)
        ]
        return {**passed_on(row), "captions": captions, **_fate(checked)}


def subjects_of(row: Row, config: GradeConfig) -> list[Subject]:
    """Captions of a row that make statements, those of an engine error excluded, and the controls that do."""
    subjects = captions_of(row.beside[CAPTIONS])
    if config.controls:
        subjects += [subject for subject in controls(row, (), config) if subject.name in CHECKED_CONTROLS]
    return [subject for subject in subjects if subject.status != Status.ENGINE_ERROR and (subject.text or "").strip()]


def _fate(checked: list[CheckedCaption]) -> dict[str, Any]:
    """Status and error of a row, where they are not those of its input: a failed request is to be repeated.

    Sentences without an answer would get none again: they are null, and the first one's reason is the row's error.
    """
    if error := next((caption.error for caption in checked if caption.error), ""):
        return {"status": str(Status.ENGINE_ERROR), "error": error}
    reason = next((reason for caption in checked if (reason := caption.unanswered)), None)
    if reason is None:
        return {}
    if any(value is not None for caption in checked for value in caption.probabilities):
        return {"error": reason}
    refused = any(caption.refused for caption in checked)
    return {"status": str(Status.REFUSED if refused else Status.ENGINE_ERROR), "error": reason}


def passed_on(row: Row) -> dict[str, Any]:
    """Output row of an unchecked one: its own status and error, no captions."""
    return {"key": row.key, "uid": row.uid, "status": str(row.status), "error": row.error, "captions": []}
