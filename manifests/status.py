"""What became of a row. Errors are rows, never drops, and this is the whole vocabulary."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The ``status`` column. ``ok`` rows carry the stage's product; every other row carries a reason in ``error``."""

    OK = "ok"
    CORRUPT = "corrupt"  # the bytes are damaged: truncated, zero-length, unreadable header
    UNSUPPORTED = "unsupported"  # sound bytes that are not what this stage takes: HTML, GIF, a link, an unsafe name
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    DUPLICATE = "duplicate"  # a key that the shard already had, or (dedup) an image that repeats another
    CONTAMINATED = "contaminated"
    UNSAFE = "unsafe"
    EMPTY = "empty"  # the model wrote nothing
    DEGENERATE = "degenerate"  # loops, `!!!!`, boilerplate
    REFUSED = "refused"
    TRUNCATED = "truncated"  # cut at the token limit
    FILTERED = "filtered"
    ENGINE_ERROR = "engine_error"

    @property
    def resolved(self) -> bool:
        """Whether the row's fate is final. An engine error says nothing about the row: it is to be tried again."""
        return self is not Status.ENGINE_ERROR
