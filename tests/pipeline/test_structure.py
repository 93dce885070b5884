"""The layout that docs/architecture.md promises: floors, no circles, folders and files of bounded size."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("errors", "terminal", "manifests", "models", "stages", "trainer", "pipeline")  # each imports those before it
MOST_LINES, MOST_FILES = 399, 20
MOST_BYTES = 54 << 20  # of all files that git tracks

Module = tuple[str, ...]  # ("models", "images", "decode"); a package stands for its __init__


def modules(root: Path) -> dict[Module, Path]:
    """All modules of the product below ``root``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in FLOORS:
            found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def imports(module: Module, path: Path, known: Mapping[Module, Path]) -> Iterator[Module]:
    """What a module imports of the product, inside functions as well."""
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            source = (*package[: len(package) - node.level + 1], *name)
        elif name[:1] == ("capipe",):
            source = name[1:]
        else:
            continue
        for alias in node.names:
            yield next((each for each in ((*source, alias.name), source) if each in known), source)


def edges(root: Path) -> list[tuple[Module, Module]]:
    known = modules(root)
    return [(module, target) for module, path in known.items() for target in imports(module, path, known)]


def levels(pairs: list[tuple[Module, Module]]) -> dict[Module, dict[str, set[str]]]:
    """For each folder: which of its files and folders import which others of them."""
    found: dict[Module, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for source, target in pairs:
        shared = 0
        while source[shared : shared + 1] == target[shared : shared + 1] != ():
            shared += 1
        ends = [(each[shared : shared + 1] or ("__init__",))[0] for each in (source, target)]
        if ends[0] != ends[1]:
            found[source[:shared]][ends[0]].add(ends[1])
    return found


def circles(root: Path) -> list[str]:
    found = []
    for folder, graph in levels(edges(root)).items():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(f"{'/'.join(folder) or '.'}: {' <- '.join(error.args[1])}")
    return found


def upward(root: Path) -> list[str]:
    pairs = [(a, b) for a, b in edges(root) if b and FLOORS.index(b[0]) > FLOORS.index(a[0])]
    return [f"{'.'.join(a)} imports {'.'.join(b)}" for a, b in pairs]


def long_files(root: Path) -> list[str]:
    counts = {path: len(path.read_text().splitlines()) for path in root.rglob("*.py") if ".venv" not in str(path)}
    return [f"{path.relative_to(root)}: {lines} lines" for path, lines in counts.items() if lines > MOST_LINES]


def full_folders(root: Path) -> list[str]:
    counts: dict[Path, int] = defaultdict(int)
    for path in [*modules(root).values(), *(root / "bench").rglob("*.py")]:
        counts[path.parent] += 1
    return [f"{folder}: {count} files" for folder, count in counts.items() if folder != root and count > MOST_FILES]


def test_no_import_runs_upward() -> None:
    assert upward(ROOT) == []


def test_no_circles_between_the_files_and_folders_of_a_folder() -> None:
    assert circles(ROOT) == []


def test_sizes() -> None:
    assert long_files(ROOT) == [] and full_folders(ROOT) == []


ROLE = re.compile(r":(?:mod|func|class|data|meth|attr):`~?(\.+)([\w.]+)`")


def dead_references(root: Path) -> list[str]:
    """Modules that a docstring names relative to its own, as in ``:func:`.tar.printable```, which are not there."""
    known, found = modules(root), []
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module[:-1]
        for dots, name in ROLE.findall(path.read_text()):
            target = (*package[: len(package) - len(dots) + 1], *name.split("."))
            named = next(
                target[:length] for length in range(len(target), -1, -1) if not length or target[:length] in known
            )
            if named != target and (not named or known[named].name == "__init__.py"):
                found.append(f"{path.relative_to(root)}: {dots}{name}")
    return found


def test_docstrings_name_modules_that_are_there() -> None:
    assert dead_references(ROOT) == []


def test_no_file_repeats_its_folders_name() -> None:
    named = [module for module in modules(ROOT) if len(module) > 1 and module[-1] == module[-2]]
    assert named == []


@pytest.mark.parametrize(
    ("files", "check"),
    [
        ({"models/a.py": "from ..stages.b import x", "stages/b.py": "x = 1"}, upward),
        ({"models/a.py": "from . import b", "models/b.py": "def f():\n    from .a import x"}, circles),
        ({"models/a/x.py": "from ..b import y", "models/b.py": "from .a.z import y", "models/a/z.py": ""}, circles),
        ({"models/a.py": '""":func:`.b.x`"""'}, dead_references),
        ({"models/a.py": "\n" * 400}, long_files),
        ({f"models/m{n}.py": "" for n in range(21)}, full_folders),
    ],
)
def test_each_check_can_fail(tmp_path: Path, files: dict[str, str], check: object) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert callable(check) and len(check(tmp_path)) == 1


def tracked_bytes(root: Path) -> int:
    """Bytes of the files that git tracks, as they lie in the checkout; a link counts its own few."""
    command = ["git", "-c", f"safe.directory={root}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=60).stdout.split(b"\0")
    paths = [os.fsencode(root) + b"/" + name for name in listed if name]
    return sum(os.lstat(path).st_size for path in paths if os.path.lexists(path))


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@needs_git
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_the_repository_stays_small() -> None:
    """Weights above all: see `models/tiny/train/bundle.py` for those that several models have."""
    size = tracked_bytes(ROOT)
    assert 1 << 20 < size < MOST_BYTES, f"git tracks {size / 2**20:.2f} MiB"


@needs_git
def test_tracked_bytes_are_counted(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, timeout=60)
    (tmp_path / "weights").write_bytes(b"0" * 1000)
    (tmp_path / "link").symlink_to("weights")
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "untracked").write_bytes(b"0" * 1000)
    assert tracked_bytes(tmp_path) == 1000 + len("weights")
