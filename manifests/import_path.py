"""Objects named by an import path, ``package.module:name``: a stage, an engine, an export format, a reward, a loss.

Importing runs the module, so a path comes from a command line, a recipe or this package, never from data.
"""

from __future__ import annotations

import importlib
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import BadInput

_PATH = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")


def is_import_path(text: str) -> bool:
    """True if a name has the form of an import path, which no URL has."""
    return _PATH.fullmatch(text) is not None


def import_object(path: str) -> Any:
    """:func:`load_object` for a path on the command line or in a chain. Raises BadInput if there is no such object."""
    try:
        return load_object(path)
    except ValueError as error:
        raise BadInput(str(error)) from error


def load_object(path: str) -> Any:
    """The object at ``package.module:name``. Raises ValueError, with a message for users, if there is none."""
    module_name, name = _parts(path)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name}; install it, or add its folder to PYTHONPATH"
        else:
            reason = f"{module_name} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
        raise ValueError(f"{path}: {reason}") from None
    if not hasattr(module, name):
        raise ValueError(f"{path}: module {module_name} has no {name}")
    return getattr(module, name)


def source_digest(path: str) -> str | None:
    """sha256 (hex) of the source of the module in ``path``, for fingerprints; None for a module without a file."""
    file = getattr(importlib.import_module(_parts(path)[0]), "__file__", None)
    return None if file is None else sha256(Path(file).read_bytes()).hexdigest()


def _parts(path: str) -> tuple[str, str]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is no import path; write package.module:name")
    return match["module"], match["name"]
