"""``key=value`` options: read once, the same for all of them; and what such an option of a second model sets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import BadInput
from ...manifests.files.bounded_json import MAX_NESTING, is_deeper

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
TEMPLATE = "template"  # the section of a second model's options that its chat template gets

#: Options of an engine by their long names: the field that each sets (of EngineConfig, but for ``decode_workers``), and
#: what it takes.
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
#: Those of one model alone: another one named beside it does not get them.
OWN: Mapping[str, Any] = {"template_args": {}, "engine_args": {}, "adapter": ""}
_WORDS = {float: "a number", int: "a whole number", str: "a text"}


def key_values(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """``["a=1", "b.c=x"]`` as ``{"a": 1, "b": {"c": "x"}}``; values are JSON where that parses, else texts.

    Raises BadInput, naming ``option``, for what is no key=value, and for a key that is given twice.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise BadInput(
                f"{option} {text!r}: write key=value, the key of letters, digits and _; dots go into objects"
            )
        *path, last = key.split(".")
        inner = found
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise BadInput(f"{option} {text!r}: {name} has a value already; give it once")
        if last in inner:
            raise BadInput(f"{option} {text!r}: {key} is given twice")
        inner[last] = _value(value)
    return found


def engine_args(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Arguments by vLLM's own names, which may be written as on its command line: ``block-size=32``."""
    return _underscored(option, key_values(option, given))


def second_model(
    option: str, first: Mapping[str, Any], given: Sequence[str] | None, *, same: bool, sees: bool = True
) -> dict[str, Any]:
    """The engine options of a command's second model: the first one's, with what ``option`` gives in their place.

    A key is one of :data:`FIELDS`, ``template.KEY``, or an argument of vLLM. ``same``: it is the first model again,
    adapter and all. Raises BadInput.
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


def _underscored(option: str, given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name in found:
            raise BadInput(f"{option} {key}: is given twice")
        found[name] = value
    return found


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
