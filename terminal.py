"""Escaped output for terminals and logs: text from data may contain control characters.

Escape sequences move the cursor, set titles and hide text; direction overrides reorder the text shown; a line break
starts a line that looks like one of capipe's own. All of them are written as ``\\x1b`` and the like.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:
    _Handler = logging.StreamHandler

# ASCII and Latin-1 controls, direction marks and overrides, line and paragraph separators.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """``text`` on one line, with control characters escaped. Letters are unchanged."""
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def print_line(line: object = "") -> None:
    """Print a result to stdout."""
    print(escaped(str(line)), flush=True)


def print_err(text: object) -> None:
    """Print a message to stderr. Further lines (a traceback's) are indented, so none looks like one of capipe's own."""
    print(_set_in(str(text)), file=sys.stderr, flush=True)


def _set_in(text: str) -> str:
    return "\n    ".join(map(escaped, text.rstrip("\n").split("\n")))


class _EscapingHandler(_Handler):
    """Last-resort log handler (:data:`logging.lastResort`): escapes records and writes to ``sys.stderr``."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return _set_in(super().format(record))


def escape_logs() -> None:
    """Escape warnings of our modules and uncaught errors of this process, as :func:`print_err` does."""
    logging.lastResort = _EscapingHandler()
    sys.excepthook = _show_error


def _show_error(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    lines = "".join(traceback.format_exception(kind, error, at)).rstrip("\n").split("\n")
    print("\n".join(map(escaped, lines)), file=sys.stderr, flush=True)
