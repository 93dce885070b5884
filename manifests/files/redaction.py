"""Secrets: the API key, and the passwords, tokens and signatures of URLs. They are used, and neither kept nor shown.

Text passes here where it leaves the program: what is printed, JSON that is written, a row's ``error``. Two things are
replaced by ``***``: values that are known (the key of the environment, what the URLs of the command line and of recipes
hold), in the forms that servers and libraries repeat them in, and, known or not, what stands in a URL where a secret
does.
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
LEAST, PLAIN = 4, 16  # characters: shorter values are words of any text; longer ones are looked for within words, too

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
    """Remember the secrets of all URLs in ``texts``: a command line, a recipe's values."""
    for text in texts:
        for scheme, userinfo in _USERINFO.findall(text):
            user, colon, password = userinfo.partition(":")
            _noted.update(_forms(password if colon else user if scheme.lower().startswith("http") else ""))
            _noted.update(_forms(base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()))
        for _, value in _QUERY.findall(text):
            if len(value) >= PLAIN:  # a photo's ?key=cat is none
                _noted.update(_forms(value))


def note_started() -> None:
    """Remember those that this process was started with: of its command line, its proxies, hubs and stores."""
    note(sys.argv)
    note(value for name, value in os.environ.items() if name.lower() in PROXIES)
    _noted.update(value for name in OTHER_KEYS if len(value := os.environ.get(name, "").strip()) >= PLAIN)


def api_key() -> str:
    """The environment's key, without the blanks and newlines around it that files and pastes leave."""
    return os.environ.get(API_KEY_VARIABLE, "").strip()


def redacted(text: str) -> str:
    """A message without secrets."""
    return _QUERY.sub(rf"\1{HIDDEN}", printed(text))


def printed(text: str) -> str:
    """The same for the terminal, where the viewer's own link is to be seen with its token."""
    return _without_userinfo(without_known(text, LEAST))


def redacted_data(value: Any) -> Any:
    """Settings as of JSON: URLs in them without secrets. Short values are let stand: names may have them as parts."""
    if isinstance(value, str):
        text = without_known(value)
        return _QUERY.sub(rf"\1{HIDDEN}", _without_userinfo(text)) if "://" in text else text
    if isinstance(value, dict):
        return {redacted_data(key): redacted_data(each) for key, each in value.items()}
    return [redacted_data(each) for each in value] if isinstance(value, list | tuple) else value


def redacted_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of an artifact: its ``error`` is a message, all else is data."""
    return {**row, "error": redacted(row["error"])} if isinstance(row.get("error"), str) else row


def without_secrets(url: str) -> str:
    """A URL by what it names: without the secrets in it, so that a new password or signature makes no other one."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(r"\1://", url))


def identity_of(value: Any) -> Any:
    """Settings as a fingerprint covers them: each URL that stands in them by what it names."""
    if isinstance(value, str):
        return without_secrets(value) if _URL.match(value) else value
    if isinstance(value, dict):
        return {key: identity_of(each) for key, each in value.items()}
    return [identity_of(each) for each in value] if isinstance(value, list | tuple) else value


def _without_userinfo(text: str) -> str:
    return _USERINFO.sub(_hidden_userinfo, text) if "@" in text else text


def _hidden_userinfo(found: re.Match[str]) -> str:
    scheme, userinfo = found.groups()
    user, colon, _ = userinfo.partition(":")
    if colon:
        return f"{scheme}://{user}:{HIDDEN}@"
    return f"{scheme}://{HIDDEN}@" if scheme.lower().startswith("http") else found[0]  # sftp://user@host is no secret


def without_known(text: str, least: int = PLAIN) -> str:
    """``text`` without the known values of ``least`` characters: by default those that stand in no text by chance."""
    pattern = _known_values(api_key(), frozenset(_noted), least)
    return text if pattern is None else pattern.sub(HIDDEN, text)


def _forms(value: str) -> set[str]:
    """A value as written, as meant, and as URLs and JSON write it."""
    meant = unquote(value)
    coded = quote(meant, safe="")
    lower = re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), coded)
    return {form for form in (value, meant, coded, lower, json.dumps(meant)[1:-1]) if len(form) >= LEAST}


@lru_cache(maxsize=16)
def _known_values(key: str, noted: frozenset[str], least: int) -> re.Pattern[str] | None:
    """What finds all known values of ``least`` characters, the longest first; short ones as whole words alone."""
    values = {*noted, *_forms(key), base64.b64encode(key.encode()).decode()}
    words = [
        re.escape(value) if len(value) >= PLAIN else rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])"
        for value in sorted(values, key=len, reverse=True)
        if len(value) >= least
    ]
    return re.compile("|".join(words)) if words else None


class RedactedStream(io.TextIOWrapper):
    """Standard output or error that shows no secret, whoever writes to it: logs and tracebacks, too."""

    former: io.TextIOWrapper | None = None

    def write(self, text: str) -> int:
        super().write(printed(text))
        return len(text)


def redact_output() -> None:
    """From now on nothing that this process prints shows a secret. Streams that were put in their place stay."""
    note_started()
    sys.stdout, sys.stderr = _redacting(sys.stdout), _redacting(sys.stderr)


def _redacting(stream: Any) -> Any:
    if type(stream) is not io.TextIOWrapper:
        return stream
    stream.flush()
    shown = RedactedStream(
        stream.buffer,
        stream.encoding,
        "backslashreplace",  # names of files need not be UTF-8, and are shown nevertheless
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    shown.former = stream  # whose end would close what both write to
    return shown
