"""What is installed is what lies in the tree: every module, bundled model, recipe, template and static file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("manifests", "models", "stages", "trainer", "pipeline", "recipes")  # those of the package


def product() -> list[Path]:
    """All files of the package, relative to the root."""
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())]
    return sorted(path.relative_to(ROOT) for path in files if path.parent.name != "__pycache__")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a wheel is packed from, and all that setuptools said. Built from links: nothing is written into the tree."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for path in [*product(), *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (source / path.parent).mkdir(parents=True, exist_ok=True)
        (source / path).symlink_to(ROOT / path)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build_py"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return source / "build/lib/capipe", done.stdout + done.stderr


def test_every_file_of_the_package_is_installed(build: tuple[Path, str]) -> None:
    lib, _ = build
    installed = sorted(path.relative_to(lib) for path in lib.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert installed == product()


def test_what_is_a_link_here_is_a_file_there(build: tuple[Path, str]) -> None:
    """A wheel knows no links; bundled models that share a vision encoder link to it."""
    lib, _ = build
    links = [path for path in product() if (ROOT / path).is_symlink()]
    assert links and all(path.suffix == ".safetensors" for path in links)
    for path in links:
        assert not (lib / path).is_symlink() and (lib / path).read_bytes() == (ROOT / path).read_bytes()


def test_setting_up_warns_of_nothing_that_a_user_could_not_change(build: tuple[Path, str]) -> None:
    """setuptools takes folders of data for forgotten packages where ``include-package-data`` is on."""
    assert "would be ignored" not in build[1] and "configuration" not in build[1]
