"""Whether an output is its own input: what `--fresh` removes, or a commit replaces, must never be what is read."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import BadInput

_LOCAL = ("", "file", "local")
_SAME_STORE = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}


def refuse_overwriting(out: str, read: Iterable[str]) -> None:
    """Raise BadInput where the folder ``out`` is, holds, or lies in something of ``read``: paths or fsspec URLs.

    Links are followed, those of ``out`` and those that are read; a link inside ``out`` is also its own to remove.
    Patterns are the caller's to resolve: what is read are the files that they name.
    """
    target = _resolved(out)
    for source in read:
        for place in _places(source):
            if place == target:
                raise _refusal(out, "is", source)
            if _is_within(place, target):
                raise _refusal(out, "holds", source)
            if _is_within(target, place):
                raise _refusal(out, "lies in", source)


def _refusal(out: str, relation: str, source: str) -> BadInput:
    named = "it" if relation == "is" else source
    said = "is what to read" if relation == "is" else f"{relation} {named}, which is to be read"
    return BadInput(f"{out}: {said}; choose another --out")


def _places(source: str) -> Iterator[str]:
    """Where ``source`` is: at its own name, in the folder that this stands in, and where a link of that name leads."""
    yield _resolved(source)
    path = _local_path(source)
    if path is not None:
        named = Path(path).absolute()
        yield str(named.parent.resolve() / named.name)


def _resolved(url: str) -> str:
    path = _local_path(url)
    if path is not None:
        return str(Path(path).resolve())
    scheme, _, rest = url.rpartition("::")[2].partition("://")
    return f"{_SAME_STORE.get(scheme, scheme)}://{posixpath.normpath(rest.lstrip('/'))}"


def _local_path(url: str) -> str | None:
    """The path of a local file; None where it is elsewhere. Of a chained URL what counts is where it ends."""
    last = url.rpartition("::")[2]
    scheme, found, rest = last.partition("://")
    if not found:
        return last.removeprefix("file:").removeprefix("local:")
    return rest if scheme in _LOCAL else None


def _is_within(place: str, folder: str) -> bool:
    return place.startswith(folder.rstrip("/") + "/")
