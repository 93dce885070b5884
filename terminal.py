"""What leaves for a terminal or a log: lines whose text may come from data, and can make a terminal do nothing.

Escape sequences move the cursor, set titles and hide text; overrides of direction show a line as another one; a line
break begins a line that looks like ours. All of them are shown as ``\\x1b`` and the like.
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

# Controls of ASCII and Latin-1, marks and overrides of direction, separators of lines and paragraphs.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """``text`` on one line, with all that a terminal obeys spelled out. Any letter stays as it is."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def print_line(line: object = "") -> None:
    """A result, on stdout."""
    print(escaped(str(line)), flush=True)


def print_err(text: object) -> None:
    """A word to who watches, on stderr. Further lines (a traceback's) are set in, so that none looks like ours."""
    print(_set_in(str(text)), file=sys.stderr, flush=True)


def _set_in(text: str) -> str:
    return "\n    ".join(map(escaped, text.rstrip("\n").split("\n")))


class _EscapingHandler(_Handler):
    """Where records go that no handler takes, as :data:`logging.lastResort`: stderr as it is at that moment."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return _set_in(super().format(record))


def escape_logs() -> None:
    """Let warnings of our modules and uncaught errors of this process leave as :func:`print_err` writes."""
    logging.lastResort = _EscapingHandler()
    sys.excepthook = _show_error


def _show_error(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    lines = "".join(traceback.format_exception(kind, error, at)).rstrip("\n").split("\n")
    print("\n".join(map(escaped, lines)), file=sys.stderr, flush=True)
