"""Names in the product are the field's: none of the private words that were replaced comes back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from capipe.pipeline.cli import app

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("manifests", "models", "stages", "trainer", "pipeline")

#: A private word, as a whole word of a name in snake_case or CamelCase, and what is said instead.
PRIVATE = {
    "desk": "shard queue",
    "crew": "worker pool",
    "hand": "worker handle",
    "hire": "start",
    "hired": "started",
    "barren": "made no progress",
    "buried": "exited",
    "workplace": "placement",
    "pace": "throughput",
    "finding": "check, discovered",
    "findings": "problems",
    "joins": "shard join",
    "survey": "select plan",
    "annotating": "annotate",
    "quizzing": "qa",
    "grading": "grade",
    "scoring": "score",
    "selecting": "select",
    "deduplicating": "dedup",
    "exporting": "export",
    "ingesting": "ingest",
    "reporting": "eval",
    "figures": "metrics, results",
    "grades": "graded rows",
    "judges": "evaluation models, rewards",
    "ranks": "distributed",
    "verdict": "result, status",
    "together": "dynamic batcher",
    "recent": "LRU cache",
    "family": "model adapter",
    "school": "trainer",
    "course": "training loop",
    "lesson": "curriculum",
    "lessons": "curriculum",
    "graduates": "quiz models",
    "retelling": "caption augmentation",
    "wording": "captions",
    "drawing": "sampling",
    "drawn": "sampled",
    "fluency": "language model",
    "examine": "check",
    "mend": "fix, repair",
    "mended": "repaired",
    "foretell": "predict",
    "told": "reported",
    "tower": "vision encoder",
    "towers": "encoders",
}
#: Whole names: one of their words alone is the field's.
PRIVATE_NAMES = {
    "closed_sets", "question_checks", "question_sets", "question_index", "same_picture", "alignment", "growing_cache",
    "captioner_kinds", "affinity", "several", "views", "items", "words", "health", "measures", "assembly", "sharding",
    "adapter", "probe", "tasks", "Task", "turns", "Judge", "Part", "Clip", "Desk", "Ranks", "inline_runner", "events",
    "outcome", "View", "plain_school", "matching", "pairs", "features", "detect_module", "Hand", "Crew", "Verdict",
}  # fmt: skip
#: Names that keep such a word, each with its reason.
ALLOWED = {
    "ranks": "of retrieval: the position of the right image",
    "ranks_of": "of retrieval: the position of the right image",
}


def words(name: str) -> list[str]:
    """``fooBarBaz``, ``FooBar`` or ``foo_bar`` in words."""
    return [each.lower() for each in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", name)]


def private(name: str, is_function: bool = False) -> bool:
    if name in ALLOWED:
        return False
    return any(each in PRIVATE for each in words(name)) or (name in PRIVATE_NAMES and not is_function)


def names(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Names of modules, classes and functions below ``root``, each with its place and whether it is a function."""
    for path in sorted(each for folder in FOLDERS for each in (root / folder).rglob("*.py")):
        where = str(path.relative_to(root))
        yield where, path.stem if path.stem != "__init__" else path.parent.name, False
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield where, node.name, False
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield where, node.name, True


def options() -> Iterator[tuple[str, str]]:
    commands: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, sub in commands.items():
        for parameter in sub.params:
            yield name, str(parameter.name)


def test_modules_classes_and_functions() -> None:
    assert [f"{where}: {name}" for where, name, is_function in names(ROOT) if private(name, is_function)] == []


def test_options() -> None:
    found = list(options())
    assert len(found) > 100
    assert [each for each in found if private(each[1], is_function=True)] == []


@pytest.mark.parametrize("name", ["Desk", "RayCrew", "_hire_afresh", "is_mended", "told_texts", "Task", "views"])
def test_private_names_are_seen(name: str) -> None:
    assert private(name) and not private("ShardQueue") and not private("shard_queue")
