"""Validation of file names that come from data: a manifest, a configuration, a claim or a table.

Every reader of such a name validates it here before using it: a name refers to a file below the folder in which it was
found, or it is refused. Paths and URLs that may refer to other places are checked in :mod:`.outside`.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Container
from pathlib import Path

from .tar import printable

MAX_NAME = 1024  # characters of a name with its folders
MAX_PART = 255  # bytes of a file's name on the usual file systems
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MAX_FILE = 160  # bytes of a name made from a key, with room for an extension
_HARMFUL = re.compile(  # characters that some file system rejects or maps to another name; and our own escapes
    r"""[\x00-\x1f\x7f-\x9f\u2028\u2029<>:"/\\|?*]|%(?=[0-9A-Fa-f]{2})|^[ .]|[ .]\Z"""
    r"""|^[cpanlCPANL](?=(?i:on|rn|ux|ul|om[0-9¹²³]|pt[0-9¹²³]|onin\$|onout\$)\ *(?:\.|$))"""
)
_ANY_BUT_PLAIN = re.compile(r"[^a-z0-9_]|^[cpanl](?=(?:on|rn|ux|ul|om[0-9]|pt[0-9])$)")
_ANY = re.compile(".", re.DOTALL)
#: Names of letters, digits and ``_.-`` alone, as most are, which have no problem: found out first, as manifests name a
#: hundred thousand files. At most four parts of at most 200 characters.
_SURELY_SOUND = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}){0,3}")
_ELSEWHERE = re.compile(r"/|~[^/]*/|~$|[A-Za-z]:/|[A-Za-z]:$")  # relative to the root, a home folder, a drive


def name_problem(name: object) -> str | None:
    """Why ``name`` is not a valid name of a file below a folder (``a.tar``, ``images/00000/a.jpg``), or None."""
    if not isinstance(name, str):
        return f"a name is {type(name).__name__}, not text"
    return None if _SURELY_SOUND.fullmatch(name) else unusual_name_problem(name)


def unusual_name_problem(name: str) -> str | None:
    """:func:`name_problem` for any text, by every rule: the slow twin of the test for plain names."""
    shown = printable(name[:80])
    if not name:
        return "a name is empty"
    if len(name) > MAX_NAME:
        return f"a name of {len(name)} characters ({shown}…)"
    if _CONTROLS.search(name):
        return f"the name {shown!r} has control characters"
    if _ELSEWHERE.match(name) or "\\" in name or "://" in name or "::" in name:
        return f"the name {shown!r} is a path or URL of its own"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return f"the name {shown!r} climbs out of its folder"
    try:
        sizes = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        return f"the name {shown!r} has half a surrogate pair, which is no character"
    if max(sizes) > MAX_PART:
        return f"a part of the name {shown!r} has over {MAX_PART} bytes"
    return None


def checked_name(name: object) -> str:
    """``name``, if it is the name of a file below its folder. Raises ValueError, with a message for users, if not."""
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(problem)
    return str(name)


def file_name(key: str, taken: Container[str] = ()) -> str:
    """A file name, without extension, for a key from data: valid on every file system, including Windows.

    A key that is a valid name stays unchanged. Harmful characters become ``%`` and two hexadecimal digits per byte, as
    in URLs, so that two keys never share a name, and ``urllib.parse.unquote`` restores the key; a name of over
    :data:`MAX_FILE` bytes ends in a digest. ``taken``: casefolded names in the same folder; of a key that differs from
    one only in case, more letters are escaped.
    """
    for harmful in (_HARMFUL, _ANY_BUT_PLAIN, _ANY):
        name = _fitting(harmful.sub(_escaped, key) or "%", key)
        if same_file(name) not in taken:
            return name
    return _fitting("", key)


def same_file(name: str) -> str:
    """Common form of names that denote one file on case-insensitive or normalizing file systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def _fitting(name: str, key: str) -> str:
    if name and len(name.encode("utf-8", "surrogatepass")) <= MAX_FILE:
        return name
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{name.encode('utf-8', 'replace')[: MAX_FILE - 33].decode(errors='ignore')}~{digest}"


def linked_parent(folder: Path, name: str) -> Path | None:
    """The first folder of ``name`` below ``folder`` that is a symbolic link; None if the path has no links.

    The last part of ``name`` is not checked: a rename or a removal affects a link itself, not its target.
    """
    here = folder
    for part in name.split("/")[:-1]:
        here = here / part
        if here.is_symlink():
            return here
    return None
