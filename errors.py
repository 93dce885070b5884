"""Errors for users: one line each, with the subject, the reason and the fix."""

from __future__ import annotations

from collections.abc import Sequence


class CapipeError(Exception):
    """An error that the user can fix; the CLI prints the message as one line and exits with :attr:`exit_code`."""

    exit_code = 2


class BadInput(CapipeError):
    """A path, option, configuration or file that cannot be used as it is (exit 2)."""


class Missing(BadInput):
    """Something a run needs that does not exist yet: data, a folder of weights (exit 2)."""


class Problems(BadInput):
    """Several input errors, reported together; ``lines`` has one message for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


class ArtifactMismatch(CapipeError):
    """An output folder of another configuration, or one with files that contradict its manifest (exit 2)."""


class DamagedShard(ArtifactMismatch):
    """A shard of the input whose files contradict its manifest. A job of many quarantines it, and does the others."""


class RunFailed(CapipeError):
    """A run that cannot continue although its input is valid: a dead engine, a full disk (exit 3)."""

    exit_code = 3
