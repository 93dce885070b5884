"""Patterns that match several files: braces, which are expanded here, and file system wildcards."""

from __future__ import annotations

import re

from ...errors import BadInput

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_pattern(url: str) -> bool:
    """True if ``url`` is a pattern instead of one file or folder."""
    return any(c in url for c in "{*?[")


def braced(pattern: str) -> list[str]:
    """Expand ``a{01..03}.tar`` and ``{a,b}.tar``, keeping zero padding."""
    match = _RANGE.search(pattern)
    if match:
        first, last = match.group(1), match.group(2)
        if int(first) > int(last):
            raise BadInput(f"{pattern}: the range runs backwards; write {{{last}..{first}}}")
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        match = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
        if not match:
            return [pattern]
        parts = match.group(1).split(",")
    return [out for part in parts for out in braced(pattern[: match.start()] + part + pattern[match.end() :])]
