"""Status values of rows. Errors are rows, never drops; this is the complete list."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The ``status`` column. ``ok`` rows contain the stage's result; every other row has a reason in ``error``."""

    OK = "ok"
    CORRUPT = "corrupt"  # the bytes are damaged: truncated, zero-length, unreadable header
    MISSING = "missing"  # absent by its server's answer (HTTP 404), or no longer in its source
    READ_ERROR = "read_error"  # a temporary read failure: an unmounted share, a busy server, a decoder out of memory
    UNSUPPORTED = "unsupported"  # valid bytes of a kind this stage does not accept: HTML, GIF, a link, an unsafe name
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    DUPLICATE = "duplicate"  # a key that the shard already has, or (dedup) a copy of another image
    CONTAMINATED = "contaminated"
    UNSAFE = "unsafe"
    WITHDRAWN = "withdrawn"  # its uid is on a list of images that may not be used: an opt-out, a takedown
    EMPTY = "empty"  # the model wrote nothing
    DEGENERATE = "degenerate"  # loops, `!!!!`, boilerplate
    REFUSED = "refused"
    TRUNCATED = "truncated"  # cut at the token limit
    FILTERED = "filtered"
    ENGINE_ERROR = "engine_error"

    @property
    def resolved(self) -> bool:
        """True if the status is final. The two exceptions say nothing about the row: it is to be tried again."""
        return self not in (Status.ENGINE_ERROR, Status.READ_ERROR)


class QuestionStatus(StrEnum):
    """Status of one question of a row. ``ok`` after writing: well formed; after screening: kept."""

    OK = "ok"
    MALFORMED = "malformed"  # no question could be parsed
    BAD_OPTIONS = "bad_options"  # too few or too many, empty, identical, or referring to other options ("both A and B")
    BAD_ANSWER = "bad_answer"  # none of the options, or several
    DUPLICATE = "duplicate"  # repeats a question about the same image
    LEAKED = "leaked"  # answered without the image
    UNSUPPORTED = "unsupported"  # not answered as required with the image
    UNSCORED = "unscored"  # the engine failed on it, or too few answers name an option to decide
