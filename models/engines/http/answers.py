"""Parsing of server responses: completions, choices and errors, in the many variants of OpenAI's protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import httpx

from ....manifests.files.redaction import redacted, without_known
from ..base import ChoiceScores, Completion, FinishReason, Refused, Rejected, RequestError, Thought, among_allowed
from ..thinking import OPENING, split_thought

#: Finish reasons for an answer truncated at its limit, and for one that was aborted. All others are regular ends.
CUT = ("length", "max_tokens", "max_length", "model_length")
BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "canceled", "timeout", "insufficient_system_resource")
FILTERED = (
    "content_filter",
    "content_filtered",
    "sensitive",
    "safety",
    "refusal",
    "recitation",
    "prohibited_content",
    "blocklist",
)
LONGEST_SAID = 65_536  # characters of a message that are examined
NO_LOGPROBS = (
    "the server reports no log-probabilities, from which letters are read; take sampled ones (--reader-mode sampled, "
    "in a recipe `mode: sampled`), or a server that reports them"
)
THINKS = (
    "the model begins with a thought where a letter was to come; switch it off (--template-arg enable_thinking=false), "
    "or take a model that does not think"
)

# A rate limit is transient, and providers advertise their billing page in its message: only an exhausted quota counts.
_QUOTA = re.compile(
    r"insufficient[ _](quota|credits?|balance|funds)|billing_hard_limit|credit balance is too low", re.I
)
_FILTER = re.compile(
    r"content[ _]?(filter|policy|management)|moderation|flagged|inappropriate content|data_inspection"
    r"|safety (system|filter|policy)",
    re.I,
)


class Unavailable(RequestError):
    """The server, not the request, is at fault: another server may answer it.

    ``busy``: it reported that it has no room (429, 502, 503, 529).
    """

    def __init__(self, message: str, *, final: bool = False, busy: bool = False) -> None:
        super().__init__(message, final=final)
        self.busy = busy


class SentAway(Unavailable):
    """The request never reached the server, which was excluded while it waited."""


# --- completions -----------------------------------------------------------------------------------------------------


def read_completion(answer: dict[str, Any], logprobs: bool, token_ids: bool, barred: Sequence[int] = ()) -> Completion:
    """The answer's text and the thought before it. Raises RequestError, or Refused where it was declined.

    ``barred``: ids that were never sampled, whose probability goes to the others; the answer reports it.
    """
    choice = first_choice(answer)
    message = _message(choice)
    reason = finish_reason(choice, message)
    steps = tuple(_logprob(step, barred) for step in _steps(choice)) if logprobs else None
    n_tokens = _count(answer)
    ids = _token_ids(choice, n_tokens) if token_ids else ()
    if n_tokens is None:
        n_tokens = len(ids or steps or ()) or None
    text, thought = _answer(message, reason)
    return Completion(text, ids, reason, n_tokens, steps, thought, **prompt_counts(answer))


def first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    if error := answer.get("error"):  # some gateways report errors with status 200
        complaint = Complaint(200, *_said(error))
        said = str(complaint.message)
        raise Refused(f"refused: {said}", said) if complaint.filtered else RequestError(said)
    raise RequestError(f"the server's answer has no choices: {cut(answer, 200)}")


def finish_reason(choice: dict[str, Any], message: dict[str, Any]) -> FinishReason:
    """How the answer ended; an unknown finish reason, or none, is a regular end.

    Raises Refused, and RequestError where the server reports that it aborted.
    """
    _check_not_refused(choice, message)
    said = str(choice.get("finish_reason")).lower()
    if said in BROKEN_OFF:
        raise RequestError(f"the server broke the answer off ({said!r})")
    return "length" if said in CUT else "stop"


def _check_not_refused(choice: dict[str, Any], message: dict[str, Any]) -> None:
    said = choice.get("finish_reason")
    if refusal := message.get("refusal"):
        raise _refused_by_model(refusal)
    if isinstance(said, str) and said.lower() in FILTERED:
        words = message.get("content")
        raise Refused(
            f"refused: the answer was withheld by the server's filter ({said})",
            _written(words) if isinstance(words, str) else "",
        )


def _refused_by_model(words: Any) -> Refused:
    text = _written(str(words))
    return Refused(f"refused by the model: {cut(text, 500)}", text)


def _answer(message: dict[str, Any], reason: FinishReason) -> tuple[str, Thought | None]:
    """A message's text, and the thought before it, which servers that know the tags return separately."""
    content, reasoning = message.get("content"), _reasoning(message)
    if isinstance(content, list):
        content = _joined(content)
    if content is None and (reasoning or reason == "length"):  # all tokens went into a thought
        content = ""
    if content is None:
        raise RequestError(f"the server ended the answer with {reason!r} and null content: it wrote nothing")
    if not isinstance(content, str):
        raise RequestError(f"the server's answer has {type(content).__name__} content, which is no text")
    text, thought = split_thought(_written(content))
    if reasoning and thought is None:
        thought = Thought(_written(reasoning).strip(), closed=bool(text) or reason == "stop")
    return text, thought


def _joined(parts: Sequence[Any]) -> str:
    """The text of content in parts; other parts (a thought, a citation) are left out."""
    texts = list[str]()
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "refusal":
            raise _refused_by_model(part.get("refusal"))
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
            texts.append(str(part.get("text", "")))
    return "".join(texts)


def _reasoning(message: dict[str, Any]) -> str:
    """A thought that the server returns separately from the answer, under either of its names."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return reasoning if isinstance(reasoning, str) else ""


def _message(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    return message if isinstance(message, dict) else {}


def _written(text: str) -> str:
    """The model's text in a response, without unpaired surrogates: JSON may contain them and UTF-8 cannot.

    Also without our key, in case a server echoes what it was sent.
    """
    return without_known(text.encode("utf-8", "replace").decode())


def _count(answer: dict[str, Any]) -> int | None:
    """Number of tokens the server counted, None where it does not say."""
    return _counted(answer.get("usage"), "completion_tokens")


def prompt_counts(answer: dict[str, Any]) -> dict[str, int | None]:
    """Tokens of the prompt and of its image, as the server counted them; few say how many are the image's."""
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return {"prompt_tokens": _counted(usage, "prompt_tokens"), "image_tokens": _counted(details, "image_tokens")}


def _counted(counts: Any, name: str) -> int | None:
    count = counts.get(name) if isinstance(counts, dict) else None
    return count if type(count) is int and count >= 0 else None


def _token_ids(choice: dict[str, Any], count: int | None) -> tuple[int, ...]:
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or count not in (None, len(ids)):
        reason = "the server does not return token ids; training samples from a vLLM server"
        raise RequestError(reason, final=not isinstance(ids, list))
    return tuple(ids)


# --- choices ---------------------------------------------------------------------------------------------------------


def read_choice(answer: dict[str, Any], choices: Sequence[str]) -> ChoiceScores:
    """Scores of ``choices`` among the first token's reported alternatives; None for one that is not among them.

    A letter with a space before it counts as that letter. Raises RequestError, a final one where the server reports no
    log-probabilities or the model thinks first.
    """
    choice = first_choice(answer)
    message = _message(choice)
    _check_not_refused(choice, message)
    steps = _steps(choice)
    if not steps:
        raise RequestError(THINKS if _reasoning(message) else NO_LOGPROBS, final=True)
    first = steps[0]
    said = _bare(first.get("token"))
    if said == OPENING:
        raise RequestError(THINKS, final=True)
    reported = first.get("top_logprobs")
    alternatives = [entry for entry in reported if isinstance(entry, dict)] if isinstance(reported, list) else []
    tokens = {str(entry.get("token")): _number(entry, "logprob") for entry in (first, *alternatives)}
    scores = tuple(_log_sum(value for token, value in tokens.items() if _bare(token) == letter) for letter in choices)
    if _reasoning(message) and all(score is None for score in scores):
        raise RequestError(THINKS, final=True)
    return ChoiceScores(scores, said, **prompt_counts(answer))


def _bare(token: Any) -> str:
    """A reported token without the space before it, which some servers write in their tokenizer's form."""
    return str(token).replace("▁", " ").replace("Ġ", " ").strip()


def _log_sum(logprobs: Iterable[float]) -> float | None:
    """Log-probability of any of several tokens; None for none."""
    known = list(logprobs)
    highest = max(known, default=-math.inf)
    if not math.isfinite(highest):  # none, or no number
        return highest if known else None
    return highest + math.log(sum(math.exp(value - highest) for value in known))


def _steps(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The reported tokens with their log-probabilities, in order."""
    logprobs = choice.get("logprobs")
    steps = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise RequestError(NO_LOGPROBS, final=True)
    return steps


def _logprob(step: dict[str, Any], barred: Sequence[int]) -> float:
    """The token's log-probability, among the ids that are not ``barred``."""
    logprob = _number(step, "logprob")
    if not barred:
        return logprob
    reported = step.get("top_logprobs")
    entries = [entry for entry in reported if isinstance(entry, dict)] if isinstance(reported, list) else []
    known = {str(entry.get("token")): entry for entry in entries}
    if missing := [token for token in barred if f"token_id:{token}" not in known]:
        raise RequestError(
            f"the server does not report the log-probability of token {missing[0]}, as vLLM does for "
            "`logprob_token_ids`: without it those of the sampling distribution are unknown",
            final=True,
        )
    return among_allowed(logprob, (_number(known[f"token_id:{token}"], "logprob") for token in barred))


def _number(step: dict[str, Any], name: str) -> float:
    value = step.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"the server reports {value!r} as a log-probability")
    return float(value)


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Complaint:
    """An error response. ``param``: the field that the server names; ``fields``: those that a validator lists."""

    status: int
    message: str
    code: str = ""
    param: str = ""
    fields: tuple[str, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether the same request may be answered later, as the server itself reports."""
        return self.status in (429, 502, 503, 529) and not self.quota

    @property
    def passing(self) -> bool:
        """Whether a retry is worthwhile."""
        return self.busy or self.status == 408 or self.status >= 500

    @property
    def quota(self) -> bool:
        return self.status == 402 or (self.status == 429 and bool(_QUOTA.search(f"{self.code} {self.message}")))

    @property
    def filtered(self) -> bool:
        """Whether a filter declined this one request."""
        return self.status in (200, 400, 403, 422) and bool(_FILTER.search(f"{self.code} {self.message}"))

    def error(self) -> RequestError:
        """The exception for this request, which also says whether later requests will fail."""
        text = f"HTTP {self.status}: {self.message}"
        if self.filtered:
            return Refused(f"refused: {text}", self.message)
        if self.status in (401, 402, 403, 404, 405, 410) or self.quota or 300 <= self.status < 400:
            return Unavailable(text, final=True)
        return Rejected(text) if 400 <= self.status < 500 else RequestError(text)


def read_complaint(response: httpx.Response) -> Complaint:
    if location := response.headers.get("location"):
        return Complaint(response.status_code, f"the server is at {cut(location, 500)}")
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return Complaint(response.status_code, cut(response.text, 500))
    error = answer.get("error") or answer if isinstance(answer, dict) else answer
    return Complaint(response.status_code, *_said(error))


def cut(said: Any, length: int) -> str:
    """The beginning of a server's text, without secrets: redacted before it is cut, or part of one could remain."""
    try:
        return redacted(str(said)[:LONGEST_SAID])[:length]
    except RecursionError:  # nested deeper than any real message
        return type(said).__name__


def _said(error: Any) -> tuple[str, str, str, tuple[str, ...]]:
    """Message, code, parameter and listed fields of an error body in any of its usual forms."""
    if not isinstance(error, dict):
        return cut(error, 500), "", "", ()
    detail = error.get("detail")
    listed = [item for item in detail if isinstance(item, dict)] if isinstance(detail, list) else []
    fields = tuple(str(item["loc"][-1]) for item in listed if item.get("loc"))
    code = " ".join(str(error[key]) for key in ("code", "type") if error.get(key) is not None)
    message = error.get("message") or detail or error
    return cut(message, 500), cut(code, 500), str(error.get("param") or ""), fields


def retry_after(response: httpx.Response) -> float | None:
    """Seconds the server asks to wait, None for a missing or invalid header; it is a number or a date."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
    return seconds if 0 <= seconds < float("inf") else 0.0 if seconds < 0 else None


def json_object(response: httpx.Response) -> dict[str, Any] | None:
    """A successful response's body; None where it broke on its way. Raises RequestError where it never was JSON."""
    try:
        answer = response.json()
    except (ValueError, RecursionError) as error:
        if response.text.lstrip().startswith("{"):
            return None
        kind = "HTML" if response.text.lstrip()[:1] == "<" else "not JSON"
        raise RequestError(
            f"the server's answer is {kind}: {cut(response.text, 200)!r}; is the URL that of an OpenAI API?"
        ) from error
    if not isinstance(answer, dict):
        raise RequestError(f"the server's answer is no JSON object: {cut(response.text, 200)!r}")
    return answer
