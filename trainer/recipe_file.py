"""Recipes as files: a YAML mapping found by path or bundled name, with ``section.key=value`` overrides.

Two kinds lie in ``recipes/``: those of a training run (`capipe train`) and those of a chain of commands (`capipe run`),
which have ``stages``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import BadInput
from ..manifests.redaction import note

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
CHAIN_KEY = "stages"  # what only a chain has
Kind = Literal["training", "chain"]
_COMMANDS = {"training": "train", "chain": "run"}


def find_recipe(given: Path) -> Path:
    """The YAML file meant: itself, or the bundled recipe of that name (``tiny``) where there is no such file."""
    bundled = RECIPES / f"{given}.yaml"
    return bundled if given.name == str(given) and bundled.is_file() and not given.is_file() else given


def bundled(kind: Kind) -> str:
    """The names of the recipes of a kind that come along, for people."""
    files = sorted(RECIPES.glob("*.yaml"))
    return ", ".join(file.stem for file in files if _kind(read_mapping(file)) == kind)


def read_recipe(given: Path, overrides: Sequence[str], kind: Kind) -> dict[str, Any]:
    """The mapping in a recipe's file with its overrides. Raises BadInput, also for a recipe of the other kind."""
    path = find_recipe(given)
    try:
        loaded = read_mapping(path)
    except OSError as error:
        reason = f"no recipe there ({error.strerror}); give a YAML file or a bundled one: {bundled(kind)}"
        raise BadInput(f"{path}: {reason}") from None
    found = _kind(loaded)
    if found != kind:
        shown = given if given.name == str(given) else path
        raise BadInput(f"{path}: this is the recipe of a {found}; run it by: capipe {_COMMANDS[found]} {shown}")
    for override in overrides:
        apply_override(loaded, override)
    return loaded


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises OSError where there is none, BadInput where it is something else."""
    try:
        text = path.read_text(encoding="utf-8")
        note([text])
        loaded = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: a recipe is a mapping of keys, this is {type(loaded).__name__}")
    return loaded


def engines_of(value: Any) -> Iterator[str]:
    """All that a recipe, or a part of one, names as an engine."""
    if isinstance(value, dict):
        for key, each in value.items():
            if isinstance(each, str) and str(key).rpartition("-")[2] == "engine":
                yield each
            else:
                yield from engines_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from engines_of(each)


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in place; the value is YAML. Raises BadInput where there is no such place."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise BadInput(f"--set {override!r}: write section.key=value")
    *sections, last = key.split(".")
    at: Any = recipe
    for section in sections:
        if isinstance(at, list):
            at = _entry(at, section, override)
            continue
        at = at.setdefault(section, {})
        if not isinstance(at, dict | list):
            raise BadInput(f"--set {override!r}: {section} is a value, not a section")
    if not isinstance(at, dict):
        raise BadInput(f"--set {override!r}: name a key after the list's entry, e.g. rewards.0.weight")
    try:
        at[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {override!r}: not YAML: {' '.join(str(error).split())}") from None


def _entry(entries: list[Any], section: str, override: str) -> Any:
    if not section.isdigit() or int(section) >= len(entries):
        raise BadInput(f"--set {override!r}: the list has entries 0 to {len(entries) - 1}")
    return entries[int(section)]


def _kind(loaded: dict[str, Any]) -> Kind:
    return "chain" if CHAIN_KEY in loaded else "training"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice: YAML's own answer, that the last one counts, loses a stage in silence."""

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
