"""Ways of decoding that not every engine supports: refused in words, before the first request where that is known."""

from __future__ import annotations

from typing import Any

from ...errors import BadInput
from ...manifests.import_path import is_import_path
from .base import RequestError, Sampling


def search_option(sampling: Sampling) -> str | None:
    """The option, with its value, that only the transformers engine supports; None for none."""
    if sampling.beams > 1:
        return f"--beams {sampling.beams}"
    return f"--no-repeat-ngram {sampling.no_repeat_ngram}" if sampling.no_repeat_ngram else None


def extended_option(sampling: Sampling) -> str | None:
    """The option, with its value, that OpenAI's protocol has no field for; None for none."""
    if sampling.min_tokens:
        return f"--min-tokens {sampling.min_tokens}"
    return f"--repetition-penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else None


def no_search(sampling: Sampling, who: str) -> str | None:
    """Why ``who``, an engine that only samples, refuses; None where it does not."""
    option = search_option(sampling)
    return None if option is None else f"{option}: {who} does not decode so; give --engine transformers"


def no_extensions(sampling: Sampling) -> str | None:
    """Why a server of OpenAI's fields alone refuses; None where it does not."""
    option = extended_option(sampling)
    return None if option is None else f"{option}: the server is neither vLLM nor SGLang; leave it out"


def refused_by_server(sampling: Sampling, extended: bool) -> str | None:
    """Why a server refuses; ``extended``: it takes more than OpenAI's fields. None where it does not."""
    return no_search(sampling, "a server") or (None if extended else no_extensions(sampling))


def server_fields(sampling: Sampling, extended: bool) -> dict[str, Any]:
    """A request's fields beyond OpenAI's for ``sampling``. Raises RequestError where the server has none such."""
    if (why := refused_by_server(sampling, extended)) is not None:
        raise RequestError(why, final=True)
    fields = {"repetition_penalty": sampling.repetition_penalty, "min_tokens": sampling.min_tokens}
    return {name: value for name, value in fields.items() if value != getattr(Sampling(), name)}


def engine_kind(kind: str, sampling: Sampling) -> str:
    """The kind of engine to start: ``auto`` becomes transformers where nothing else decodes so.

    Raises BadInput for vLLM and servers where they cannot.
    """
    if search_option(sampling) is None or kind == "transformers" or is_import_path(kind):
        return kind
    if kind == "auto":
        return "transformers"
    raise BadInput(str(no_search(sampling, "vLLM" if kind == "vllm" else "a server")))
