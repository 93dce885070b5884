"""The rule of marks, and the reader that applies it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from capipe.manifests.shards import Row
from capipe.manifests.status import Status
from capipe.stages.filter.marked import MARKS, MarkedReader, marked_status, standing

REPEATED = {"status": "duplicate", "error": "looks like a"}


@pytest.mark.parametrize(
    ("own", "mark", "said"),
    [
        (("ok", "a note"), None, ("ok", "a note")),
        (("ok", "a note"), {"status": "ok", "error": None}, ("ok", "a note")),
        (("ok", "a note"), REPEATED, ("duplicate", "looks like a")),
        (("corrupt", "cut"), REPEATED, ("corrupt", "cut")),  # its own comes first
        (("degenerate", "loops"), {"status": "ok", "error": None}, ("degenerate", "loops")),
    ],
)
def test_a_rows_own_status_comes_first_then_that_of_its_mark(
    own: tuple[str, str | None], mark: dict[str, Any] | None, said: tuple[str, str | None]
) -> None:
    assert marked_status(*own, mark) == said


def test_only_ok_rows_stand() -> None:
    assert standing([str(status) for status in Status]).sum() == 1 and standing(["duplicate", "ok"]).tolist() == [0, 1]


class Read:
    def __init__(self, *rows: Row) -> None:
        self.rows, self.info = rows, {"digest": "d"}

    def __iter__(self) -> Iterator[Row]:
        yield from self.rows


def test_marked_rows_have_no_image_and_all_others_are_as_they_were() -> None:
    fine = Row(
        0, "a", "1", Status.OK, "a note", b"image", "jpg", "alt", beside={MARKS: {"status": "ok", "error": None}}
    )
    repeated = Row(1, "b", "2", Status.OK, None, b"image", "jpg", "alt", {"n": 1}, {MARKS: REPEATED}, 512)
    damaged = Row(2, "c", None, Status.CORRUPT, "cut", beside={MARKS: REPEATED})
    plain = Row(3, "d", "3", Status.OK, image=b"image")
    reader = MarkedReader(Read(fine, repeated, damaged, plain))
    rows = list(reader)
    assert rows[0] is fine and rows[2] is damaged and rows[3] is plain and reader.info == {"digest": "d"}
    left_out = Row(1, "b", "2", Status.DUPLICATE, "looks like a", None, "jpg", "alt", {"n": 1}, {MARKS: REPEATED}, 512)
    assert rows[1] == left_out and rows[1].status is Status.DUPLICATE
