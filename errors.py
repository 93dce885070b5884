"""The errors a person is meant to read: one line that names the thing, the reason and the mend."""

from __future__ import annotations

from collections.abc import Sequence


class CapipeError(Exception):
    """Something the user can mend; the CLI prints the message as one line and exits with :attr:`exit_code`."""

    exit_code = 2


class BadInput(CapipeError):
    """A path, option, configuration or file that cannot be used as it is (exit 2)."""


class Missing(BadInput):
    """Something that a run needs and that may yet come to be: data, a folder of weights (exit 2)."""


class Problems(BadInput):
    """Several things that cannot be used as they are, found together; ``lines`` has one for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


class ArtifactMismatch(CapipeError):
    """An output folder of another configuration, or one whose files contradict its manifest (exit 2)."""


class RunFailed(CapipeError):
    """A run that could not go on, through no fault of its input: a dead engine, a full disk (exit 3)."""

    exit_code = 3
