"""Recipe files: YAML mappings found by path or bundled name, with ``section.key=value`` overrides.

``recipes/`` holds two kinds: recipes of a training run (`capipe train`), and of a chain of commands (`capipe run`),
which have the key ``stages``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import yaml

from ..errors import BadInput
from ..manifests.files.redaction import note

if TYPE_CHECKING:
    from pydantic import ValidationError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MAX_BYTES = 2**20
MAX_VALUES = 100_000
MAX_NESTING = 50  # depth of nested lists and mappings; a chain that contains a training recipe has under 10
CHAIN_KEY = "stages"  # only in chains
Kind = Literal["training", "chain"]
_COMMANDS = {"training": "train", "chain": "run"}


def find_recipe(named: Path) -> Path:
    """Path of a recipe: the file itself, or the bundled recipe of this name (``tiny``) if there is no such file."""
    bundled = RECIPES / f"{named}.yaml"
    return bundled if named.name == str(named) and bundled.is_file() and not named.is_file() else named


def bundled(kind: Kind) -> str:
    """Names of the bundled recipes of a kind, for messages."""
    files = sorted(RECIPES.glob("*.yaml"))
    return ", ".join(file.stem for file in files if _kind(read_mapping(file)) == kind)


def read_recipe(named: Path, overrides: Sequence[str], kind: Kind) -> dict[str, Any]:
    """Mapping of a recipe file with overrides applied. Raises BadInput, also for a recipe of the other kind."""
    path = find_recipe(named)
    try:
        loaded = read_mapping(path)
    except OSError as error:
        reason = f"no recipe there ({error.strerror}); give a YAML file or a bundled one: {bundled(kind)}"
        raise BadInput(f"{path}: {reason}") from None
    actual = _kind(loaded)
    if actual != kind:
        shown = named if named.name == str(named) else path
        raise BadInput(f"{path}: this is the recipe of a {actual}; run it by: capipe {_COMMANDS[actual]} {shown}")
    for override in overrides:
        apply_override(loaded, override)
    return loaded


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises OSError if there is no file, BadInput if it is not a YAML mapping."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadInput(f"{path}: no recipe: over {MAX_BYTES >> 20} MiB")
        text = data.decode("utf-8")
        note([text])
        loaded = _parsed(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # invalid UTF-8, invalid numbers or dates
        raise BadInput(f"{path}: not YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: a recipe is a mapping of keys, this is {type(loaded).__name__}")
    return loaded


def first_problem(error: ValidationError) -> str:
    """First invalid key of a recipe, with the reason."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the recipe"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # our own message already names the value
        return f"{key}: {reason}"
    return f"{key}: {reason}" + (
        "; no such key" if first["type"] == "extra_forbidden" else f" (got {first['input']!r})"
    )


def engines_of(value: Any) -> Iterator[str]:
    """Values of all engine keys in a recipe, or a part of one."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if isinstance(entry, str) and str(key).rpartition("-")[2] == "engine":
                yield entry
            else:
                yield from engines_of(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from engines_of(entry)


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in place; the value is YAML. Raises BadInput if there is no such section."""
    key, sign, text = override.partition("=")
    shown = repr(override if len(override) <= 200 else override[:199] + "…")
    if not sign or not key:
        raise BadInput(f"--set {shown}: write section.key=value")
    *sections, last = key.split(".")
    if len(sections) > MAX_NESTING:
        raise BadInput(f"--set {shown}: {len(sections)} sections in each other; at most {MAX_NESTING}")
    at: Any = recipe
    for section in sections:
        if isinstance(at, list):
            at = _entry(at, section, shown)
            continue
        at = at.setdefault(section, {})
        if not isinstance(at, dict | list):
            raise BadInput(f"--set {shown}: {section} is a value, not a section")
    if not isinstance(at, dict):
        raise BadInput(f"--set {shown}: name a key after the list's entry, e.g. rewards.0.weight")
    try:
        at[last] = _parsed(text)
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"--set {shown}: not YAML: {' '.join(str(error).split())}") from None


def _entry(entries: list[Any], section: str, override: str) -> Any:
    if not section.isdigit() or int(section) >= len(entries):
        raise BadInput(f"--set {override}: the list has entries 0 to {len(entries) - 1}")
    return entries[int(section)]


def _kind(loaded: dict[str, Any]) -> Kind:
    return "chain" if CHAIN_KEY in loaded else "training"


def _parsed(text: str) -> Any:
    """Parse YAML. Raises YAMLError; ValueError for a well-formed but impossible value (32 March)."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader with limits. Refuses duplicate keys, since YAML would silently keep the last one and lose a
    stage; nesting over MAX_NESTING (recursion limits, here and later) and over MAX_VALUES values, with aliases
    expanded; and aliases of a node that contains them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open = 0
        self._extents: dict[int, tuple[int, int]] = {}  # depth and number of values of each finished node, by id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark, is_alias = event.start_mark, isinstance(event, yaml.AliasEvent)
        self._open += 1
        if self._open > MAX_NESTING:
            self._refuse(f"nested over {MAX_NESTING} deep", mark)
        node = super().compose_node(parent, index)
        self._open -= 1
        if not is_alias:
            self._extents[id(node)] = self._extent(node, mark)
        elif id(node) not in self._extents:
            self._refuse("an alias of what it lies in", mark)
        return node

    def _extent(self, node: Any, mark: Any) -> tuple[int, int]:
        parts = [] if isinstance(node, yaml.ScalarNode) else list(node.value)
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        depth = 1 + max((self._extents[id(part)][0] for part in parts), default=0)
        values = 1 + sum(self._extents[id(part)][1] for part in parts)
        if depth > MAX_NESTING or values > MAX_VALUES:
            self._refuse(f"nested over {MAX_NESTING} deep, or over {MAX_VALUES} values, with its aliases", mark)
        return depth, values

    def _refuse(self, problem: str, mark: Any) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                text = f"{key_node.value!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)
