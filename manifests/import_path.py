"""Objects named by an import path, ``package.module:NAME``: a stage, an engine, an export format of the user's own.

Importing runs the module. So a path comes from a command line, a recipe or this package, never from data.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from ..errors import BadInput

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(text: str) -> bool:
    """Whether ``text`` has the form of an import path."""
    return _PATH.fullmatch(text) is not None


def import_object(path: str) -> Any:
    """The object at an import path.

    Raises BadInput where there is no such module or object, or the module's own code fails.
    """
    if not is_import_path(path):
        raise BadInput(f"{path}: no import path; write package.module:NAME")
    module, _, name = path.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"{path}: {error}; install the package, or add its folder to PYTHONPATH") from error
    except Exception as error:
        raise BadInput(f"{path}: importing {module} failed ({type(error).__name__}: {error})") from error
    if not hasattr(loaded, name):
        raise BadInput(f"{path}: module {module} has no {name}")
    return getattr(loaded, name)
