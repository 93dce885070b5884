"""Redaction of secrets: the API key, and passwords, tokens and signatures in URLs. None is ever stored or shown.

Applied to text that leaves the program: printed lines, written JSON, a row's ``error``. Two things are replaced by
``***``: known values (the key in the environment, secrets in URLs of the command line and of recipes), in the forms in
which servers and libraries repeat them, and, known or not, the parts of a URL where secrets usually are.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

API_KEY_VARIABLE = "CAPIPE_API_KEY"
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
OTHER_KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")
HIDDEN = "***"
LEAST, PLAIN = 4, 16  # characters: shorter values occur in any text; longer ones are also searched within words

_USERINFO = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,40})://([^\s/?#\"'<>`]*)@")
_QUERY = re.compile(
    r"([?&;](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|GoogleAccessId|sig|token"
    r"|(?:access|auth|refresh|session)[_-]?token|(?:api|access|secret)[_-]?key|key|password|passwd|pwd|secret"
    r"|client[_-]?secret)=)([^&#\s\"'<>`]+)",
    re.I,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_noted = set[str]()


def note(texts: Iterable[str]) -> None:
    """Record the secrets of all URLs in ``texts``: a command line, a recipe's values."""
    for text in texts:
        for scheme, userinfo in _USERINFO.findall(text):
            user, colon, password = userinfo.partition(":")
            _noted.update(_forms(password if colon else user if scheme.lower().startswith("http") else ""))
            _noted.update(_forms(base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()))
        for _, value in _QUERY.findall(text):
            if len(value) >= PLAIN:  # short values are not secrets: a photo's ?key=cat
                _noted.update(_forms(value))


def note_started() -> None:
    """Record secrets known at start: in the command line, and in environment variables for proxies, hubs and stores."""
    note(sys.argv)
    note(value for name, value in os.environ.items() if name.lower() in PROXIES)
    _noted.update(value for name in OTHER_KEYS if len(value := os.environ.get(name, "").strip()) >= PLAIN)


def api_key() -> str:
    """The key from the environment, stripped of whitespace left by files and pastes."""
    return os.environ.get(API_KEY_VARIABLE, "").strip()


def redacted(text: str) -> str:
    """A message without secrets."""
    return _QUERY.sub(rf"\1{HIDDEN}", printed(text))


def printed(text: str) -> str:
    """The same for the terminal, where the viewer's own link must show its token."""
    return _without_userinfo(without_known(text, LEAST))


def redacted_data(value: Any) -> Any:
    """Settings as JSON values: URLs in them without secrets. Short values are kept: names may contain them."""
    if isinstance(value, str):
        text = without_known(value)
        return _QUERY.sub(rf"\1{HIDDEN}", _without_userinfo(text)) if "://" in text else text
    if isinstance(value, dict):
        return {redacted_data(key): redacted_data(item) for key, item in value.items()}
    return [redacted_data(item) for item in value] if isinstance(value, list | tuple) else value


def redacted_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of an artifact: its ``error`` is a message, everything else is data."""
    return {**row, "error": redacted(row["error"])} if isinstance(row.get("error"), str) else row


def without_secrets(url: str) -> str:
    """A URL without its secrets, as an identity: a new password or signature does not change it."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(r"\1://", url))


def identity_of(value: Any) -> Any:
    """Settings for a fingerprint: each URL in them without its secrets."""
    if isinstance(value, str):
        return without_secrets(value) if _URL.match(value) else value
    if isinstance(value, dict):
        return {key: identity_of(item) for key, item in value.items()}
    return [identity_of(item) for item in value] if isinstance(value, list | tuple) else value


def _without_userinfo(text: str) -> str:
    return _USERINFO.sub(_hidden_userinfo, text) if "@" in text else text


def _hidden_userinfo(match: re.Match[str]) -> str:
    scheme, userinfo = match.groups()
    user, colon, _ = userinfo.partition(":")
    if colon:
        return f"{scheme}://{user}:{HIDDEN}@"
    return f"{scheme}://{HIDDEN}@" if scheme.lower().startswith("http") else match[0]  # sftp://user@host: no secret


def without_known(text: str, least: int = PLAIN) -> str:
    """``text`` without known values of at least ``least`` characters; the default length does not occur by chance."""
    pattern = _known_values(api_key(), frozenset(_noted), least)
    return text if pattern is None else pattern.sub(HIDDEN, text)


def _forms(value: str) -> set[str]:
    """A value as written, decoded, and as encoded in URLs and JSON."""
    meant = unquote(value)
    coded = quote(meant, safe="")
    lower = re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), coded)
    return {form for form in (value, meant, coded, lower, json.dumps(meant)[1:-1]) if len(form) >= LEAST}


@lru_cache(maxsize=16)
def _known_values(key: str, noted: frozenset[str], least: int) -> re.Pattern[str] | None:
    """Pattern for all known values of at least ``least`` characters, longest first; short ones only as whole words."""
    values = {*noted, *_forms(key), base64.b64encode(key.encode()).decode()}
    words = [
        re.escape(value) if len(value) >= PLAIN else rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])"
        for value in sorted(values, key=len, reverse=True)
        if len(value) >= least
    ]
    return re.compile("|".join(words)) if words else None


class RedactedStream(io.TextIOWrapper):
    """Standard output or error without secrets, for every writer: logs and tracebacks, too."""

    former: io.TextIOWrapper | None = None

    def write(self, text: str) -> int:
        super().write(printed(text))
        return len(text)


def redact_output() -> None:
    """Redact everything that this process prints from now on. Streams that were replaced already are kept."""
    note_started()
    sys.stdout, sys.stderr = _redacting(sys.stdout), _redacting(sys.stderr)


def _redacting(stream: Any) -> Any:
    if type(stream) is not io.TextIOWrapper:
        return stream
    stream.flush()
    shown = RedactedStream(
        stream.buffer,
        stream.encoding,
        "backslashreplace",  # file names need not be UTF-8, and are shown all the same
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    shown.former = stream  # kept alive: its finalizer would close the shared buffer
    return shown
