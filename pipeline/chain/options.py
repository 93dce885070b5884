"""A command's options for use in recipes, read from its signature: names, types, repetition."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typer.models import ArgumentInfo, OptionInfo

SET = "set"  # option of train
#: Options that are key=value on the command line; a recipe may use a mapping instead.
KEY_VALUES = frozenset({SET, "engine-arg", "template-arg", "screen-arg", "reader-arg", "vlm-arg"})
#: Set by the chain, or by the user who starts it; captions are appended to what is there.
_OURS = ("out", "fresh", "retry", "allow_host", "dry_run", "append_captions")


@dataclass(frozen=True)
class Option:
    """``name``: the long option without dashes, or the positional argument's name. ``kind``: its Python type."""

    name: str
    parameter: str
    kind: Any
    positional: bool
    required: bool
    least: float | None = None
    most: float | None = None
    negation: str | None = None  # --no-...

    @property
    def many(self) -> bool:
        return get_origin(_bare(self.kind)) is list

    @property
    def switch(self) -> bool:
        return _bare(self.kind) is bool

    def checked(self, value: Any) -> Any:
        """The value in the type that the command expects. Raises ValueError, with a message for users."""
        if self.many and not isinstance(value, list) and value is not None:
            value = [value]
        try:
            result = TypeAdapter(_plain(self.kind), config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{first['msg']} (got {first['input']!r})") from None
        for bound, over in ((self.least, False), (self.most, True)):
            if bound is not None and result is not None and (result > bound if over else result < bound):
                raise ValueError(f"{'at most' if over else 'at least'} {bound:g} (got {result})")
        return result

    def words(self, value: Any) -> list[str]:
        """A checked value as command-line words; none if it is the command's default."""
        if value is None:
            return []
        if self.switch:
            return [f"--{self.name}"] if value else [f"--{self.negation}"] if self.negation else []
        texts = [str(item) for item in (value if self.many else [value])]
        if self.positional:
            return texts
        # A value that begins with a dash would be taken for an option.
        return [w for t in texts for w in ([f"--{self.name}={t}"] if t.startswith("-") else [f"--{self.name}", t])]


@cache
def options_of(command: Callable[..., Any]) -> Mapping[str, Option]:
    """Options and arguments of a command that a recipe may set, by name."""
    options = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if get_origin(parameter.annotation) is not Annotated:
            continue
        kind, *facts = get_args(parameter.annotation)
        info = next((fact for fact in facts if isinstance(fact, OptionInfo | ArgumentInfo)), None)
        if info is None or parameter.name in _OURS:
            continue
        option = _option(parameter, kind, info)
        options[option.name] = option
    return types.MappingProxyType(options)


def _option(parameter: inspect.Parameter, kind: Any, info: OptionInfo | ArgumentInfo) -> Option:
    positional = isinstance(info, ArgumentInfo)
    # In an Annotated, typer stores the first name in place of the default.
    named = (info.default, *(info.param_decls or ()))
    written = [name for name in named if isinstance(name, str) and name.startswith("--")]
    name = written[0].removeprefix("--") if written else parameter.name
    if not positional:
        name = name.replace("_", "-")
    plain_switch = _bare(kind) is bool and not written
    return Option(
        name=name,
        parameter=parameter.name,
        kind=kind,
        positional=positional,
        required=parameter.default is inspect.Parameter.empty,
        least=info.min,
        most=info.max,
        negation=f"no-{name}" if plain_switch else None,
    )


def assignments(given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The leaves of a mapping as ``section.key=value``, with values in JSON (which is YAML)."""
    lines = []
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            lines += assignments(value, f"{name}.")
        else:
            lines.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
    return lines


def _bare(kind: Any) -> Any:
    """A type without None."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(member for member in get_args(kind) if member is not type(None))
    return kind


def _plain(kind: Any) -> Any:
    """The corresponding YAML type: a path is a string there."""
    bare = _bare(kind)
    plain = str if bare is Path else bare
    return plain if bare is kind else plain | None
