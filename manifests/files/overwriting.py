"""Refuses an output that is also an input: `--fresh` or a commit would delete the data being read."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import BadInput

_LOCAL = ("", "file", "local")
_SAME_STORE = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}


def refuse_overwriting(out: str, read: Iterable[str]) -> None:
    """Raise BadInput if the folder ``out`` equals, contains, or lies in one of ``read``: paths or fsspec URLs.

    Links are followed, in ``out`` and in the inputs; a link inside ``out`` also counts as part of it.
    Patterns are resolved by the caller: the inputs are the files that they match.
    """
    target = _resolved(out)
    folders: dict[Path, Path] = {}
    for source in read:
        for location in _places(source, folders):
            if location == target:
                raise _refusal(out, "is", source)
            if _is_within(location, target):
                raise _refusal(out, "holds", source)
            if _is_within(target, location):
                raise _refusal(out, "lies in", source)


def _refusal(out: str, relation: str, source: str) -> BadInput:
    named = "it" if relation == "is" else source
    said = "is what to read" if relation == "is" else f"{relation} {named}, which is to be read"
    return BadInput(f"{out}: {said}; choose another --out")


def _places(source: str, folders: dict[Path, Path]) -> Iterator[str]:
    """Locations of ``source``: its name in the resolved parent folder, and the target if that name is a link.

    ``folders``: those resolved before, since a hundred thousand tars may be in one.
    """
    path = _local_path(source)
    if path is None or path.endswith(".."):
        yield _resolved(source)
    if path is not None:
        named = Path(path).absolute()
        if named.parent not in folders:
            folders[named.parent] = named.parent.resolve()
        place = folders[named.parent] / named.name
        yield str(place)
        if place.is_symlink():
            yield str(place.resolve())


def _resolved(url: str) -> str:
    path = _local_path(url)
    if path is not None:
        return str(Path(path).resolve())
    scheme, _, rest = url.rpartition("::")[2].partition("://")
    return f"{_SAME_STORE.get(scheme, scheme)}://{posixpath.normpath(rest.lstrip('/'))}"


def _local_path(url: str) -> str | None:
    """The path of a local file; None if it is remote. For a chained URL, the last part counts."""
    last = url.rpartition("::")[2]
    scheme, separator, rest = last.partition("://")
    if not separator:
        return last.removeprefix("file:").removeprefix("local:")
    return rest if scheme in _LOCAL else None


def _is_within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
