"""Option groups: frozen dataclasses whose fields are single options of a command.

A field has type, help and default like a parameter of a Typer command. A field whose type is such a dataclass stands
for that group's options, in this position. A group declared once can be used in any number of commands::

    @dataclass(frozen=True, kw_only=True)
    class Sampling:
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
        seed: Annotated[int, typer.Option(help="Seed of all sampling.")] = 0

    @flattened
    def caption(sampling: Sampling) -> None: ...  # caption --temperature 0.7 --seed 1
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from types import SimpleNamespace
from typing import Any, TypeGuard, TypeVar, get_type_hints

Result = TypeVar("Result")


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes single options instead of its groups, in their order, as keyword arguments only.

    Its signature is read by Typer and `capipe run`. Raises TypeError if two groups have an option of the same name.
    """
    signature = inspect.Signature(single_options(command))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        bound = signature.bind(**values)
        bound.apply_defaults()
        call(command, bound.arguments)

    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()} | {"return": None}
    return flat


def call(function: Callable[..., Result], values: Mapping[str, Any]) -> Result:
    """Call a function that has groups among its parameters, given the values of single options.

    Missing options get their defaults; values of other options are ignored.
    """
    hints = _hints(function)
    return function(**_arguments(((name, hints[name]) for name in inspect.signature(function).parameters), values))


def settings(group: Any) -> dict[str, Any]:
    """A group's options by name; nested groups are kept as they are."""
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def is_group(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _arguments(names: Iterator[tuple[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for name, kind in names:
        if is_group(kind):
            hints = get_type_hints(kind)
            arguments[name] = kind(**_arguments(((f.name, hints[f.name]) for f in dataclasses.fields(kind)), values))
        elif name in values:
            arguments[name] = values[name]
    return arguments


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters only: the return type may be available to type checkers only."""
    own = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    return get_type_hints(SimpleNamespace(__annotations__=own), function.__globals__, include_extras=True)


def single_options(command: Callable[..., None]) -> list[Parameter]:
    """The options of a command, each in the position of its group. Raises TypeError if two have the same name."""
    hints = _hints(command)
    declared = inspect.signature(command).parameters.values()
    options = [option for p in declared for option in _expanded(p.name, hints[p.name], p.default)]
    shared = [name for name, count in Counter(option.name for option in options).items() if count > 1]
    if shared:
        raise TypeError(f"{command.__qualname__}: more than one of its option groups has {', '.join(shared)}")
    return options


def _expanded(name: str, kind: Any, default: Any) -> Iterator[Parameter]:
    if not is_group(kind):
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        return
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        value = Parameter.empty if field.default is dataclasses.MISSING else field.default
        yield from _expanded(field.name, hints[field.name], value)
