"""Image and caption columns of a row: one rule for tables, JSON files and datasets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from .conversations import CONVERSATION_COLUMNS, first_answer

PATH_COLUMNS = ("path", "image_path", "image", "file", "file_name", "filename", "filepath", "images")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "images")  # columns of image bytes
TEXT_COLUMNS = ("text", "caption", "txt")


@dataclass(frozen=True, slots=True)
class Columns:
    """Column options given by the user. ``folder``: root of relative paths, if it is not the table's folder."""

    path: str | None = None
    text: str | None = None
    folder: str | None = None

    def check_text(self, where: str, names: Iterable[str]) -> None:
        """Raise BadInput if the text column given by the user is not in ``names``. ``where``: for the message."""
        known = list(names)
        if self.text is not None and self.text not in known:
            raise BadInput(f"{where}: no column {self.text!r} for --text-column; its columns are {', '.join(known)}")


USUAL = Columns()


def take_caption(row: Mapping[str, Any], wanted: str | None) -> tuple[str | None, str | None]:
    """A row's caption, and the name of the column if the caption is its whole value.

    The caption is the ``wanted`` column, else the first of TEXT_COLUMNS, else the first answer of a conversation. For
    a list it is the first text; the list stays in the row.
    """
    for name in (wanted,) if wanted is not None else TEXT_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            return value, name
        if isinstance(value, list) and (first := next((text for text in value if isinstance(text, str)), None)):
            return first, None
    for name in (wanted,) if wanted is not None else CONVERSATION_COLUMNS:
        if (answer := first_answer(row.get(name))) is not None:
            return answer, None
    return None, None
