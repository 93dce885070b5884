"""Errors of stores' client libraries, as OSErrors: botocore's are none, and each library has its own.

Each becomes an OSError of the nearest kind with ``filename`` the URL and ``strerror`` a reason of one line.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

#: Passing HTTP errors, as are all from 500 on. Other codes from 400 on are permanent.
PASSING_CODES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
#: Answers to a request that raced another one for the same object: to be asked again.
_RACES = frozenset({"ConditionalRequestConflict", "OperationAborted"})
#: Client libraries of stores; some of their errors are not OSErrors.
LIBRARIES = frozenset(
    {"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "httpx", "huggingface_hub", "requests", "s3fs"}
    | {"urllib3"}
)
_CONNECTIONS = frozenset(  # names of their errors without an HTTP code that a new connection may not have
    {"HTTPClientError", "ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError", "ConnectionError"}
    | {"Timeout", "ChunkedEncodingError", "IncompleteRead", "ResponseParserError", "TransportError"}
    | {"FSTimeoutError", "ProxyError"}
)
_PASSING_ERRNOS = frozenset({errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED})
_PASSING_ERRNOS |= {errno.ETIMEDOUT, errno.EPIPE, errno.EAGAIN}


class StoreUnavailable(OSError):
    """A store that does not answer, or only by passing errors, after all tries: not the fault of the one object."""


def translated(error: BaseException, url: str) -> OSError | None:
    """A store's error as an OSError of the nearest kind with its URL; None if it is no error of a store."""
    if not (isinstance(error, OSError) or is_of_a_library(error)):
        return None
    if isinstance(error, OSError) and (error.filename == url or str(error.filename).startswith("/")):
        return error  # the latter: of a local file that was to be uploaded
    reason, code = _reason(error), http_code(error)
    if isinstance(error, FileNotFoundError) or code in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return FileNotFoundError(errno.ENOENT, reason, url)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, reason, url)
    if isinstance(error, PermissionError) or code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return PermissionError(errno.EACCES, reason, url)
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    kind = StoreUnavailable if is_passing(error) else OSError
    return kind(number, reason, url)


def is_of_a_library(error: BaseException) -> bool:
    """True if a class of the error is of a store's client library."""
    return any(kind.__module__.partition(".")[0] in LIBRARIES for kind in type(error).__mro__)


def is_passing(error: BaseException) -> bool:
    """True if the same operation may succeed later: throttling, a lost connection, a server's fault."""
    code = http_code(error)
    if code is not None:
        return code in PASSING_CODES or code >= HTTPStatus.INTERNAL_SERVER_ERROR or _aws_code(error) in _RACES
    for cause in causes(error):
        if isinstance(cause, ConnectionError | TimeoutError):
            return True
        if is_of_a_library(cause) and any(kind.__name__ in _CONNECTIONS for kind in type(cause).__mro__):
            return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: fsspec reports any failure of a URL as a missing file, and keeps the cause."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _response(error: BaseException) -> Mapping[str, Any]:
    """botocore's answer: its error code, and the HTTP status."""
    response = getattr(error, "response", None)
    return response if isinstance(response, Mapping) else {}


def _aws_code(error: BaseException) -> str | None:
    named = (_response(cause).get("Error", {}).get("Code") for cause in causes(error))
    return next((str(code) for code in named if code), None)


def http_code(error: BaseException) -> int | None:
    """The HTTP status that a server answered with, if it answered; of 400 or more."""
    for cause in causes(error):
        answered = _response(cause).get("ResponseMetadata", {}).get("HTTPStatusCode")
        response = getattr(getattr(cause, "response", None), "status_code", None)
        other = getattr(cause, "code", None) if type(cause).__module__.startswith("gcsfs") else None
        for code in (answered, getattr(cause, "status", None), response, other):
            number = int(code) if isinstance(code, str) and code.isdigit() else code
            if isinstance(number, int) and number >= HTTPStatus.BAD_REQUEST:
                return number
    return None


def _reason(error: BaseException) -> str:
    """One line: an error's message; for a URL that of its cause, as fsspec's own message is only the URL."""
    if isinstance(error, OSError) and error.strerror and not error.__cause__:
        return " ".join(str(error.strerror).split())
    cause = error.__cause__ if isinstance(error, OSError) and error.__cause__ else error
    details = _response(cause).get("Error", {})
    if details.get("Code"):
        said = str(details.get("Message") or "")
        return " ".join(f"{details['Code']}{': ' if said else ''}{said}".split())
    return " ".join(str(cause).split()) or type(cause).__name__
