"""Parsing of ``key=value`` options, and the engine settings of a second model given by such an option."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import BadInput
from ....manifests.files.bounded_json import MAX_NESTING, is_deeper

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
TEMPLATE = "template"  # section of a second model's options for its chat template

#: Engine options by their long names: the field that each sets (of EngineConfig, except ``decode_workers``) and its
#: type.
FIELDS: Mapping[str, tuple[str, type]] = {
    "gpu-memory": ("gpu_memory_utilization", float),
    "dtype": ("dtype", str),
    "max-model-len": ("max_model_len", int),
    "max-pixels": ("max_pixels", int),
    "min-pixels": ("min_pixels", int),
    "concurrency": ("concurrency", int),
    "tensor-parallel": ("tensor_parallel_size", int),
    "adapter": ("adapter", str),
    "timeout": ("timeout_s", float),
    "decode-workers": ("decode_workers", int),
}
OF_IMAGES = ("max-pixels", "min-pixels", "decode-workers")
#: Settings of one model only: a second model does not inherit them.
OWN: Mapping[str, Any] = {"template_args": {}, "engine_args": {}, "adapter": ""}
_WORDS = {float: "a number", int: "a whole number", str: "a text"}


def key_values(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Parse ``["a=1", "b.c=x"]`` into ``{"a": 1, "b": {"c": "x"}}``; values are JSON if they parse, else strings.

    Raises BadInput, naming ``option``, for a malformed key=value, and for a repeated key.
    """
    result: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise BadInput(
                f"{option} {text!r}: write key=value, the key of letters, digits and _; dots go into objects"
            )
        *path, last = key.split(".")
        inner = result
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise BadInput(f"{option} {text!r}: {name} has a value already; give it once")
        if last in inner:
            raise BadInput(f"{option} {text!r}: {key} is given twice")
        inner[last] = _value(value)
    return result


def engine_args(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """vLLM arguments by their own names, which may be written as on its command line: ``block-size=32``."""
    return _underscored(option, key_values(option, given))


def second_model(
    option: str, first: Mapping[str, Any], given: Sequence[str] | None, *, same: bool, sees: bool = True
) -> dict[str, Any]:
    """Engine options of a command's second model: the first one's, overridden by ``option``.

    A key is one of :data:`FIELDS`, ``template.KEY``, or an argument of vLLM. ``same``: it is the first model again,
    including the adapter. Raises BadInput.
    """
    options = {**first, **({} if same else OWN)}
    rest: dict[str, Any] = {}
    for key, value in key_values(option, given).items():
        if key == TEMPLATE:
            if not isinstance(value, dict):
                raise BadInput(f"{option} {TEMPLATE}={value}: write {option} {TEMPLATE}.KEY=value")
            options["template_args"] = {**options.get("template_args", {}), **value}
        elif key in FIELDS:
            if key in OF_IMAGES and not sees:
                raise BadInput(f"{option} {key}={value}: this model reads text alone; leave it out")
            field, kind = FIELDS[key]
            options[field] = _typed(option, key, kind, value)
        else:
            rest[key] = value
    if rest:
        options["engine_args"] = {**options.get("engine_args", {}), **_underscored(option, rest)}
    return options


def _underscored(option: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in arguments.items():
        name = key.replace("-", "_")
        if name in result:
            raise BadInput(f"{option} {key}: is given twice")
        result[name] = value
    return result


def _value(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    return text if is_deeper(value, MAX_NESTING) else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _typed(option: str, key: str, kind: type, value: Any) -> Any:
    if kind is str:
        return value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        raise BadInput(f"{option} {key}={value}: must be {_WORDS[kind]}")
    return kind(value)
