"""Why something could not be read: its own fault, or one of the moment that the next run may find gone.

A share that is not mounted looks like files that are not there, so a missing file, too, is a fault of the moment. A
server's own word that there is none is not.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from http import HTTPStatus

from ...manifests.status import Status
from ...models.images.formats import ImageProblem

#: Refusals of a server that pass; so do all from 500 on. Other codes from 400 on are its last word.
PASSING_CODES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
#: What an operating system says of a name that no mount will mend.
_OF_THE_NAME = frozenset({errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL})
#: Libraries that reach storage; some of their errors are no OSError.
_REMOTE = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "httpx", "huggingface_hub", "requests", "s3fs")


def read_problem(error: BaseException) -> ImageProblem | None:
    """What an error in reading makes of its item; None where it is none of reading, but something of its content."""
    code = _http_code(error)
    if code is not None:
        passing = code in PASSING_CODES or code >= HTTPStatus.INTERNAL_SERVER_ERROR
        return ImageProblem(Status.READ_ERROR if passing else Status.MISSING, f"cannot be read: {_named(code)}")
    reason = f"cannot be read: {_reason(error)}"
    if isinstance(error, OSError):
        return ImageProblem(Status.UNSUPPORTED if error.errno in _OF_THE_NAME else Status.READ_ERROR, reason)
    if isinstance(error, MemoryError | ImportError) or type(error).__module__.partition(".")[0] in _REMOTE:
        return ImageProblem(Status.READ_ERROR, reason)  # ImportError: the driver of a kind of storage
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that led to it: fsspec calls any failure of a URL a missing file, and keeps the cause."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _http_code(error: BaseException) -> int | None:
    for each in _chain(error):
        for code in (getattr(each, "status", None), getattr(getattr(each, "response", None), "status_code", None)):
            if isinstance(code, int) and code >= HTTPStatus.BAD_REQUEST:
                return code
    return None


def _named(code: int) -> str:
    try:
        return f"HTTP {code} {HTTPStatus(code).phrase}"
    except ValueError:
        return f"HTTP {code}"


def _reason(error: BaseException) -> str:
    """In words; for a URL those of the cause: fsspec says no more than the URL itself."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory ({error})"
    told = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return str(told) or type(told).__name__
