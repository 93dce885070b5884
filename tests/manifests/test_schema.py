"""Columns of an artifact: those of earlier versions are read, others are refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests.schema import ANNOTATE, ANSWERS, LATER_FIELDS, SCREEN, SCREENED_QUESTION, check


def screened(fields: list[pa.Field]) -> pa.Schema:
    position = SCREEN.get_field_index("questions")
    return SCREEN.set(position, pa.field("questions", pa.list_(pa.struct(fields))))


BEFORE = [field for field in SCREENED_QUESTION if field.name not in LATER_FIELDS]


def test_questions_screened_by_earlier_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([], schema=screened(BEFORE)), file)
    for schema in (screened(BEFORE), SCREEN, pq.read_schema(file)):
        check(schema, SCREEN, "a.parquet")
    assert len(BEFORE) == len([*SCREENED_QUESTION]) - 2


@pytest.mark.parametrize(
    "fields",
    [
        BEFORE[:-1],
        [*BEFORE, pa.field("guessed", ANSWERS)],
        [*BEFORE, pa.field("other", pa.string())],
        [*BEFORE, pa.field("guessed", pa.string()), pa.field("guess_accuracy", pa.float32())],
        [pa.field("id", pa.int64()), *BEFORE[1:]],
    ],
)
def test_other_fields_of_a_question_are_refused(fields: list[pa.Field]) -> None:
    with pytest.raises(ArtifactMismatch, match="column 'questions' is"):
        check(screened(fields), SCREEN, "a.parquet")


def test_a_missing_column_and_another_type_are_refused() -> None:
    with pytest.raises(ArtifactMismatch, match="column 'captions' is missing"):
        check(ANNOTATE.remove(ANNOTATE.get_field_index("captions")), ANNOTATE, "a.parquet")
    with pytest.raises(ArtifactMismatch, match="column 'text' is int32, expected string"):
        check(ANNOTATE.set(ANNOTATE.get_field_index("text"), pa.field("text", pa.int32())), ANNOTATE, "a.parquet")
