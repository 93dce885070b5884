"""Classification of read errors: permanent, or transient and worth a retry in the next run.

An unmounted share looks like missing files, so a missing file counts as transient. A server's answer that there is no
such file is permanent.
"""

from __future__ import annotations

import errno
from http import HTTPStatus

from ...manifests.files.store_errors import PASSING_CODES, causes, is_of_a_library
from ...manifests.status import Status
from ...models.images.formats import ImageProblem

#: Operating system errors caused by the name itself, which no mount will fix.
_OF_THE_NAME = frozenset({errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL})


def read_problem(error: BaseException) -> ImageProblem | None:
    """The problem that a read error means for its item; None if the error is not one of reading, but of the content."""
    code = _http_code(error)
    if code is not None:
        passing = code in PASSING_CODES or code >= HTTPStatus.INTERNAL_SERVER_ERROR
        return ImageProblem(Status.READ_ERROR if passing else Status.MISSING, f"cannot be read: {_named(code)}")
    reason = f"cannot be read: {_reason(error)}"
    if isinstance(error, OSError):
        return ImageProblem(Status.UNSUPPORTED if error.errno in _OF_THE_NAME else Status.READ_ERROR, reason)
    if isinstance(error, MemoryError | ImportError) or is_of_a_library(error):
        return ImageProblem(Status.READ_ERROR, reason)  # ImportError: the fsspec driver is missing
    return None


def _http_code(error: BaseException) -> int | None:
    for cause in causes(error):
        for code in (getattr(cause, "status", None), getattr(getattr(cause, "response", None), "status_code", None)):
            if isinstance(code, int) and code >= HTTPStatus.BAD_REQUEST:
                return code
    return None


def _named(code: int) -> str:
    try:
        return f"HTTP {code} {HTTPStatus(code).phrase}"
    except ValueError:
        return f"HTTP {code}"


def _reason(error: BaseException) -> str:
    """Message of an error; for a URL that of its cause, as fsspec's own message is only the URL."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory ({error})"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return str(cause) or type(cause).__name__
