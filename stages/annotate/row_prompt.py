"""What a row is asked: a prompt with the row's values in it, or its fallback, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...manifests.shards import Row
from ...manifests.status import Status
from .prompts import NamedPrompt
from .templates import Field, Lacking, caption_value, fields, filled, row_value

BYTES_PER_TOKEN = 16  # of a caption in a prompt, at most; captions in any language have fewer


@dataclass(frozen=True)
class Asked:
    """``prompt``: the prompt or its fallback, as written; ``text``: with the row's values."""

    prompt: NamedPrompt
    text: str


@dataclass(frozen=True)
class Unasked:
    """No request: a caption that the prompt takes is not there. ``status``: that caption's."""

    status: Status
    reason: str


@dataclass(frozen=True)
class RowValues:
    """Values of a row for one caption. ``captions``: those that it may take, by name, with their status.

    ``most``: bytes of a value of the row; ``caption_tokens``: of the longest caption.
    """

    row: Row
    captions: Mapping[str, Mapping[str, Any]]
    most: int
    caption_tokens: int

    def asked(self, prompt: NamedPrompt, fallback: NamedPrompt | None) -> Asked | Unasked:
        """The prompt with the row's values; ``fallback`` if one is lacking.

        A caption whose request failed is to be tried again, and this one with it: nothing else is asked then.
        """
        for field in fields(prompt.text):
            if field.kind == "captions" and not self._status(field.name).resolved:
                return self._unasked(field)
        try:
            return Asked(prompt, filled(prompt.text, self._value))
        except Lacking as lacking:
            if fallback is not None:
                return Asked(fallback, fallback.text)
            return self._unasked(lacking.field)

    def _value(self, field: Field) -> str | None:
        if field.kind != "captions":
            return row_value(field, self.row.text, self.row.meta, self.most)
        if self._status(field.name) is not Status.OK:
            return None
        return caption_value(self.captions[field.name]["text"] or "", BYTES_PER_TOKEN * self.caption_tokens)

    def _status(self, name: str) -> Status:
        """Of the caption of this name; a row that has none is as one that the model wrote nothing for."""
        caption = self.captions.get(name)
        return Status.EMPTY if caption is None else Status(caption["status"])

    def _unasked(self, field: Field) -> Unasked:
        status = self._status(field.name)
        status = Status.EMPTY if status is Status.OK else status  # an ok caption of blanks, from elsewhere
        return Unasked(status, f"not asked, as {field} is {status}")


def kth(captions: Mapping[str, Sequence[Mapping[str, Any]]], k: int) -> dict[str, Mapping[str, Any]]:
    """Of each name's captions the one that the ``k``-th sample of a later prompt takes: they are gone round."""
    return {name: several[k % len(several)] for name, several in captions.items() if several}
