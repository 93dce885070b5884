"""Which columns of a row hold its image and its caption: one rule for tables, JSON files and data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from .conversations import CONVERSATION_COLUMNS, first_answer

PATH_COLUMNS = ("path", "image_path", "image", "file", "file_name", "filename", "filepath", "images")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "images")  # of the bytes themselves
TEXT_COLUMNS = ("text", "caption", "txt")


@dataclass(frozen=True, slots=True)
class Columns:
    """What a user says about a source's columns. ``folder``: where relative paths begin, if not beside the table."""

    path: str | None = None
    text: str | None = None
    folder: str | None = None

    def check_text(self, where: str, names: Iterable[str]) -> None:
        """Raise BadInput where a text column is named that ``where`` does not have."""
        known = list(names)
        if self.text is not None and self.text not in known:
            raise BadInput(f"{where}: no column {self.text!r} for --text-column; its columns are {', '.join(known)}")


USUAL = Columns()


def take_caption(row: Mapping[str, Any], wanted: str | None) -> tuple[str | None, str | None]:
    """A row's caption, and the column that it was the whole of.

    The caption is the ``wanted`` column, else the first of TEXT_COLUMNS, else a conversation's first answer. Of a list
    it is the first text; the list stays in the row.
    """
    for name in (wanted,) if wanted is not None else TEXT_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            return value, name
        if isinstance(value, list) and (first := next((each for each in value if isinstance(each, str)), None)):
            return first, None
    for name in (wanted,) if wanted is not None else CONVERSATION_COLUMNS:
        if (answer := first_answer(row.get(name))) is not None:
            return answer, None
    return None, None
