"""Request fields that a server accepts: learnt from its error messages, remembered for later requests."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from ..base import RequestError
from .answers import Complaint

REPORTED_CHOICES = 20  # maximum alternatives that OpenAI's protocol reports for a token
FEWER_CHOICES = (10, 5, 2, 1)
TOKENS, NEWER_TOKENS = "max_tokens", "max_completion_tokens"
ALTERNATIVES = "top_logprobs"
#: Values that mean the same as leaving the field out, or that a server may ignore without a wrong answer.
DEFAULTS: Mapping[str, Any] = {
    "top_p": 1.0, "temperature": 1.0, "logprobs": False, "top_k": -1, "repetition_penalty": 1.0,
}  # fmt: skip
ALWAYS_SENT = ("model", "messages")  # words that occur in any message
#: Advice where a server does not accept a field that has to be sent.
REMEDIES: Mapping[str, str] = {
    "temperature": "give --temperature 1 if that is the server's own: it is then left out",
    "top_p": "give --top-p 1: it is then left out",
    "response_format": "add --no-guided",
    "chat_template_kwargs": "leave --template-arg out",
    "min_tokens": "leave --min-tokens out",
    "repetition_penalty": "leave --repetition-penalty out",
    "mm_processor_kwargs": "leave --min-pixels and --max-pixels out",
}

_UNTAKEN = re.compile(
    r"unsupported|not supported|n[o']t support|unknown|unrecogni[sz]ed|unexpected|not (permitted|allowed|implemented)"
    r"|extra[ _](inputs?|fields?|forbidden)|forbidden|invalid (param|field|argument)|no such (param|field|argument)"
    r"|only the default",
    re.I,
)
_TOO_MANY = re.compile(r"less|greater|at most|maximum|\bmax\b|exceed|between|range|limit", re.I)

logger = logging.getLogger(__name__)


class UntakenField(RequestError):
    """The server does not accept a field, or its value, that the request cannot do without."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message, final=True)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.field)


class Fields:
    """The request fields of one server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._tokens = TOKENS
        self._alternatives = REPORTED_CHOICES
        self._left_out = set[str]()

    def spelled(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``body`` in the form that this server accepts."""
        sent = {name: value for name, value in body.items() if not self._omits(name, value)}
        if self._tokens != TOKENS and TOKENS in sent:
            sent[self._tokens] = sent.pop(TOKENS)
        if ALTERNATIVES in sent:
            sent[ALTERNATIVES] = min(sent[ALTERNATIVES], self._alternatives)
        return sent

    def adapt(self, body: Mapping[str, Any], sent: Mapping[str, Any], complaint: Complaint) -> bool:
        """Learn from a refusal of ``sent``; True where ``body`` is now worth sending once more.

        Raises UntakenField where the server does not accept what has to be sent.
        """
        if complaint.status not in (400, 422):
            return False
        if self.spelled(body) != sent:  # another request has learnt it meanwhile
            return True
        if ALTERNATIVES in sent and self._fewer_alternatives(sent[ALTERNATIVES], complaint.message):
            return True
        blamed = blamed_fields(sent, complaint)
        for name in blamed:
            if not self._does_without(name, sent):
                mend = f"; {REMEDIES[name]}" if name in REMEDIES else ""
                said = f"HTTP {complaint.status}: {complaint.message}"
                raise UntakenField(f"{said} (it does not take {name}, which must be sent{mend})", name)
        return bool(blamed)

    def _omits(self, name: str, value: Any) -> bool:
        return name in self._left_out and _spare(name, value)

    def _fewer_alternatives(self, asked: int, message: str) -> bool:
        """Reduce the alternatives to as many as the server says it reports, or by a step."""
        if "logprobs" not in message or not _TOO_MANY.search(message):
            return False
        said = [number for number in map(int, re.findall(r"\d{1,3}", message)) if 0 < number < asked]
        fewer = max(said, default=next((count for count in FEWER_CHOICES if count < asked), 0))
        if not fewer:
            return False
        self._alternatives = fewer
        logger.warning("%s reports %d alternatives of a token, not %d", self._url, fewer, asked)
        return True

    def _does_without(self, name: str, sent: Mapping[str, Any]) -> bool:
        if name == TOKENS and self._tokens == TOKENS:
            self._tokens = NEWER_TOKENS
            return True
        if not _spare(name, sent[name]):
            return False
        self._left_out.add(name)
        if name == "seed":
            logger.warning("%s takes no seed: its samples cannot be reproduced", self._url)
        return True


def blamed_fields(sent: Mapping[str, Any], complaint: Complaint) -> list[str]:
    """Fields of ``sent`` that the server says it does not accept; not those whose value is merely out of range."""
    text = f"{complaint.message} {complaint.code}"
    if not _UNTAKEN.search(text):
        return []
    names = [name for name in sent if name not in ALWAYS_SENT]
    listed = [name for name in names if name == complaint.param or name in complaint.fields]
    return listed or [name for name in names if re.search(rf"(?<!\w){name}(?!\w)", complaint.message)]


def _spare(name: str, value: Any) -> bool:
    return name == "seed" or (name in DEFAULTS and DEFAULTS[name] == value and value is not None)


def response_format(json_schema: str) -> dict[str, Any]:
    """OpenAI's response format for a schema. Raises RequestError for text that is not JSON.

    The allowed white space is the server's own setting (vLLM: ``--structured-outputs-config``); the protocol has no
    field for it, and a weak model may fill its answer with it.
    """
    try:
        schema = json.loads(json_schema)
    except ValueError as error:
        raise RequestError(f"the JSON schema is not JSON: {error}") from error
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
