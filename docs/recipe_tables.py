"""Generate the tables of docs/recipes.md from the pydantic models of recipes: key, default, meaning.

    python docs/recipe_tables.py    # rewrites them in place

The tables are committed in the page, each between a pair of comments, so that they can be read without building the
site; a test (tests/pipeline/test_docs.py) compares them with the output of this script.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from capipe.trainer.recipe import Recipe
from capipe.trainer.rewards.kinds import BUILT_IN

PAGE = Path(__file__).resolve().parent / "recipes.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
HEAD = "| key | default | |\n|---|---|---|\n"


def tables() -> dict[str, str]:
    """Every table by its name: ``recipe``, and one for each kind of reward."""
    result = {"recipe": _table(_rows(Recipe, ""))}
    for kind, spec in BUILT_IN.items():
        result[kind] = _table(_rows(spec.config, ""))
    return result


def rewritten(page: str) -> str:
    """The page with each table regenerated. Raises KeyError for an unknown table."""
    generated = tables()
    return BLOCK.sub(lambda block: f"{block[1]}\n{generated[block[2]]}\n{block[3]}", page)


def _table(rows: Iterator[str]) -> str:
    return HEAD + "".join(f"{row}\n" for row in rows)


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """One row per key; the keys of a section follow it, prefixed by its name and a dot."""
    for name, field in model.model_fields.items():
        if name == "kind" and prefix == "":
            continue  # a reward's kind is the table's name
        inner, optional = _section(field.annotation)
        if inner is None:
            yield f"| `{prefix}{name}` | {_default(field)} | {_meaning(field)} |"
            continue
        summary = _first_paragraph(inner)
        default = "none" if optional else ("required" if field.is_required() else "as below")
        yield f"| **`{prefix}{name}`** | {default} | {summary} |"
        yield from _rows(inner, f"{prefix}{name}.")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model of a key that is a section, None for others, and whether the section is optional."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [member for member in get_args(annotation) if member is not type(None)]
        return (inner[0], True) if len(inner) == 1 and _is_model(inner[0]) else (None, False)
    return (annotation, False) if _is_model(annotation) else (None, False)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined and field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    return "none" if value is None else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        if len(value) > 4:
            return f"[{len(value)} entries]"
        return f"[{', '.join(_plain(item) for item in value)}]"
    return "''" if value == "" else _cell(str(value))


def _meaning(field: FieldInfo) -> str:
    """The field's description, choices and bounds."""
    parts = [_cell(field.description)] if field.description else []
    choices = _choices(field.annotation)
    if len(choices) > 1:
        parts.append(", ".join(f"`{choice}`" for choice in choices))
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in SIGNS.items()
        if getattr(rule, name, None) is not None
    ]
    if bounds:
        parts.append(", ".join(bounds))
    return "; ".join(parts)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def _first_paragraph(model: type[BaseModel]) -> str:
    return _cell(" ".join((model.__doc__ or "").split("\n\n")[0].split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
