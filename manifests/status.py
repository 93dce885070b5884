"""What became of a row. Errors are rows, never drops, and this is the whole vocabulary."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The ``status`` column. ``ok`` rows carry the stage's product; every other row carries a reason in ``error``."""

    OK = "ok"
    CORRUPT = "corrupt"  # the bytes are damaged: truncated, zero-length, unreadable header
    MISSING = "missing"  # its server says that there is none (HTTP 404), or its source has it no more
    READ_ERROR = "read_error"  # not read this time: a share that is not mounted, a busy server, a decoder out of memory
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
        """Whether the row's fate is final. These two say nothing about the row: it is to be tried again."""
        return self not in (Status.ENGINE_ERROR, Status.READ_ERROR)


class QuestionStatus(StrEnum):
    """What became of one question of a row. ``ok`` after writing: well formed; after screening: kept."""

    OK = "ok"
    MALFORMED = "malformed"  # no question could be read there
    BAD_OPTIONS = "bad_options"  # too few or too many, empty, alike, or speaking of other options ("both A and B")
    BAD_ANSWER = "bad_answer"  # none of the options, or several
    DUPLICATE = "duplicate"  # asked before about the same image
    LEAKED = "leaked"  # answered without the image
    UNSUPPORTED = "unsupported"  # not answered as it should be with the image
    UNSCORED = "unscored"  # the engine failed on it, or too few answers name an option to tell
