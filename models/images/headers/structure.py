"""What the header of an image says; common to all formats."""

from __future__ import annotations

from typing import NamedTuple

from ....manifests.status import Status

MAX_FRAMES = 1000  # of an animation, pages of a TIFF: more would be walked through for one image


class Structure(NamedTuple):
    """``width`` and ``height`` in pixels as stored (before rotation); ``frames``: of an animation, or pages.

    ``complete``: whether the file contains all that its structure refers to.
    """

    width: int
    height: int
    frames: int = 1
    complete: bool = True


class UnusableImage(Exception):
    """Found in a header: why an image is not to be decoded."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def corrupt(reason: str) -> UnusableImage:
    return UnusableImage(Status.CORRUPT, reason)


def unsupported(reason: str) -> UnusableImage:
    return UnusableImage(Status.UNSUPPORTED, reason)


def larger(first: Structure, second: Structure) -> Structure:
    """The one with more pixels: files that give two sizes are judged by the larger."""
    return second if second.width * second.height > first.width * first.height else first
