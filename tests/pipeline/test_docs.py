"""README and docs/ tell no lies that a machine can find: commands parse; recipes, files and links are there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from capipe.manifests import schema
from capipe.manifests.status import QuestionStatus, Status
from capipe.pipeline.cli import app

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLI: Any = typer.main.get_command(app)  # typer has a click of its own, or the installed one
OURS = {"capipe", "capipe.pipeline"}  # as a program, and as the module that torchrun starts

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FLOORS = "recipes|bench|tests|models|manifests|stages|trainer|pipeline"
FILE = re.compile(rf"(?<![\w./-])(?:{FLOORS})/[\w/.-]+\.(?:py|yaml)\b")
MODULE = re.compile(r"python -m (capipe[\w.]*)")
TARGET = re.compile(r"(?:^|[`\s])make ([a-z][a-z-]*)")

#: Options of other programs that pages name outside of command lines.
FOREIGN = {"--train-data", "--dataset-type", "--data_path", "--image_folder", "--no-deps", "--dev-mode"}
FOREIGN |= {"--worker-extension-cls", "--import-mode", "--structured-outputs-config", "--tensor-parallel-size"}
FOREIGN |= {"--gres", "--data-parallel-size", "--weight-transfer-config"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert list(faults(text, page)) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_commands_in_a_recipes_comments_parse(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comments = [line[1:] for line in lines if re.match(r"#\s+(capipe|torchrun) ", line)]
    assert [fault for line in command_lines("\n".join(comments)) for fault in line_faults(line)] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```sh\ncapipe annotat --shards a --out b --model c\n```", "annotat"),
        ("```sh\ncapipe annotate --shards a --out b --modell c\n```", "modell"),
        ("```sh\nPYTHONPATH=. capipe annotate --shards a \\\n    --out b  # and no model\n```", "model"),
        ("```sh\ntorchrun --nproc-per-node 8 -m capipe.pipeline train no-such-recipe --out b\n```", "no-such-recipe"),
        ("```bash\ncapipe annotate … --modell c &\n```", "--modell"),
        ("use `capipe verify --fast`", "--fast"),
        ("use `--does-nothing`", "--does-nothing"),
        ("see `recipes/none.yaml`", "recipes/none.yaml"),
        ("see [there](none.md)", "none.md"),
        ("`make nothing`", "make nothing"),
        ("```sh\npython -m capipe.models.tiny.none\n```", "capipe.models.tiny.none"),
    ],
)
def test_a_lie_is_found(text: str, fault: str) -> None:
    found = list(faults(text, ROOT / "docs/page.md"))
    assert len(found) == 1 and fault in found[0]


def test_tables_of_recipe_keys_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import recipe_tables

    page = recipe_tables.PAGE.read_text(encoding="utf-8")
    assert recipe_tables.rewritten(page) == page, "run: python docs/recipe_tables.py"
    assert {name for _, name, _ in recipe_tables.BLOCK.findall(page)} == set(recipe_tables.tables())
    sys.modules.pop("recipe_tables")


def test_consumers_find_every_column_and_status() -> None:
    text = (ROOT / "docs/consumers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    tables = (
        schema.INGEST,
        schema.DEDUP,
        schema.TEXT_MARKS,
        schema.ANNOTATE,
        schema.QUESTIONS,
        schema.SCREEN,
        schema.SELECT,
    )
    columns = {name for table in tables for name in table.names if not name.startswith("org_")}
    assert columns - named == set()
    for struct in (schema.CAPTION, schema.SCREENED_QUESTION):
        assert {field.name for field in struct} - named == set()
    assert {str(each) for each in (*Status, *QuestionStatus)} - named == set()


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"capipe ([a-z]+)", text)) | set(re.findall(r"`([a-z]+)`", text))
    assert set(commands()) - {"version"} <= named


def faults(text: str, page: Path) -> Iterator[str]:
    """What a page says that is not so, one line each."""
    for language, block in FENCE.findall(text):
        for words in command_lines(block) if language in ("sh", "bash") else ():
            # In bash a script is told, with variables and omissions; in sh calls stand as they can be made.
            yield from line_faults(words) if language == "sh" else span_faults(shlex.join(["capipe", *words]))
    prose = FENCE.sub("", text)
    for span in SPAN.findall(prose):
        yield from span_faults(span.replace("\\|", "|"))
    for file in sorted(set(FILE.findall(text))):
        if not (ROOT / file).exists():
            yield f"{file}: no such file"
    for module in sorted(set(MODULE.findall(text))):
        if importlib.util.find_spec(module) is None:
            yield f"{module}: no such module"
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    code = "\n".join([*SPAN.findall(prose), *(block for _, block in FENCE.findall(text))])
    for target in sorted(set(TARGET.findall(code)) - targets):
        yield f"make {target}: no such target"
    for link in (first or second for first, second in LINK.findall(prose)):
        place = link.partition("#")[0]
        if place and "://" not in link and not (page.parent / place).exists():
            yield f"{link}: leads nowhere"


def commands() -> dict[str, Any]:
    return dict(CLI.commands)


def command_lines(block: str) -> list[list[str]]:
    """The words of each call of ours in a shell block, after the program's name; loops and pipes cut it off."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        words.commenters = "#"
        at: list[str] | None = None
        for word in words:
            if set(word) <= set("();<>|&"):
                at = None
            elif word in OURS and at is None:
                at = []
                found.append(at)
            elif at is not None:
                at.append(word)
    return found


def line_faults(words: list[str]) -> Iterator[str]:
    """A whole call: it must parse as it stands, values and all that is required included."""
    if not words or words[0].startswith("-"):
        return
    name, *rest = words
    command = commands().get(name)
    if command is None:
        yield f"capipe {name}: no such command"
        return
    try:
        command.make_context(name, list(rest))
    except typer.Exit:  # --help
        pass
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        yield f"capipe {shlex.join(words)}: {error.format_message()}"
    if name in ("train", "run") and rest and "." not in rest[0] and not (RECIPES / f"{rest[0]}.yaml").is_file():
        yield f"capipe {name} {rest[0]}: no such recipe"


def span_faults(span: str) -> Iterator[str]:
    """Code within a sentence may name a command without all that it needs."""
    words = span.split()
    if words[:1] == ["capipe"] and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
        command = commands().get(words[1])
        if command is None:
            yield f"capipe {words[1]}: no such command"
            return
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for option in sorted(set(OPTION.findall(span)) - known - {"--help"}):
            yield f"capipe {words[1]} {option}: no such option"
    elif span.startswith("--"):
        known = {
            option for command in commands().values() for p in command.params for option in (*p.opts, *p.secondary_opts)
        }
        for option in sorted(set(OPTION.findall(span)) - known - FOREIGN - {"--help"}):
            yield f"{option}: no command has it"
