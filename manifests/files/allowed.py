"""Access check for locations named in a manifest: only local files and stores that the user named are opened.

The command line is the user's own; a manifest may come from anybody, and opening its URLs sends requests in the user's
name. Which spellings are allowed is checked in :mod:`.outside`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from fsspec.implementations.local import LocalFileSystem

from .compressed import tar_stem
from .outside import Refused, check, is_url, open_local, store
from .storage import Folder
from .tar import printable

_LOCAL = ("file://", "local://")
_WRAPPING = ("reference",)  # file systems that open the URLs listed in a file
MAX_LOG = 1 << 30  # bytes; a training step takes a few hundred
_MEMORY = "memory"  # fsspec's file system in this process's memory


@dataclass(frozen=True)
class Allowed:
    """``given``: the folder or URL that the command works on. ``named``: further folders and URLs from the command
    line, below which everything may be opened."""

    given: str
    named: tuple[str, ...] = ()

    def place(self, location: object) -> str:
        """``location`` in the form to open: a local path (absolute) or a URL. Raises Refused."""
        if not isinstance(location, str):
            raise Refused(f"no path or URL: a {type(location).__name__}")
        if location.lower().startswith(_LOCAL) or not is_url(location):
            check(location.partition("://")[2] if is_url(location) else location)
            path = "/" + str(LocalFileSystem._strip_protocol(location)).lstrip("/")  # "//proc" is /proc
            check(path)
            return path
        scheme = location.partition("://")[0].lower()
        if "::" in location or scheme in _WRAPPING:
            raise Refused(f"{printable(location[:200])}: a chain of file systems is not opened from a manifest")
        if scheme == _MEMORY or self._of_given(location) or any(_lies_below(location, prefix) for prefix in self.named):
            return _spelled(location)
        check(location)
        hint = printable((location if tar_stem(location) is None else location.rpartition("/")[0])[:200])
        raise Refused(f"{printable(location[:200])}: in a store that was not named; --images {hint} lets it be read")

    def _of_given(self, url: str) -> bool:
        return is_url(self.given) and store(url) == store(self.given)

    def elsewhere(self, location: str) -> Iterator[str]:
        """Candidate locations if the file of ``location`` has moved: directly below the folders that the user named."""
        file = location.rpartition("/")[2]
        yield from (f"{_spelled(prefix).rstrip('/')}/{file}" for prefix in self.named)


def _lies_below(url: str, prefix: str) -> bool:
    """True if a URL is ``prefix`` or below it, as the server resolves it: ``..`` can be encoded in several ways."""
    url, prefix = _spelled(url), _spelled(prefix).rstrip("/")
    rest = unquote(unquote(url.removeprefix(prefix)))
    return is_url(prefix + "/") and (url == prefix or url.startswith(prefix + "/")) and ".." not in rest.split("/")


def _spelled(url: str) -> str:
    """The URL with scheme and host in lower case."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}://{host.lower()}{slash}{path}" if is_url(url) else url


def split(place: str) -> tuple[Folder, str]:
    """Folder and file name of a place from :meth:`Allowed.place`. Raises BadInput if there is no driver for it."""
    folder, _, file = place.rpartition("/")
    return Folder(folder or "/"), file


def open_place(place: str) -> BinaryIO:
    """Open a place returned by :meth:`Allowed.place`. Raises Refused if it is not a regular file; OSError."""
    if not is_url(place):
        return open_local(place)
    folder, file = split(place)
    return folder.open(file)


def read_log(path: Path) -> bytes:
    """Read a log from a folder of unknown origin. Raises OSError, also if it is no file or over MAX_LOG bytes."""
    try:
        with open_local(str(path)) as file:
            data = file.read(MAX_LOG + 1)
    except Refused as error:
        raise OSError(str(error)) from None
    if len(data) > MAX_LOG:
        raise OSError(f"{path}: over {MAX_LOG >> 20} MiB")
    return data


def stamp_of(place: str) -> tuple[int, int]:
    """Size and modification time (0 for remote files), which change if the file is replaced. Raises OSError."""
    folder, file = split(place)
    if not is_url(place):
        stat = folder.local(file).stat()
        return stat.st_size, stat.st_mtime_ns
    return folder.size(file), 0
