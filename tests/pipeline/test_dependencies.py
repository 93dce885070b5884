"""What is declared, what is pinned and what is installed do not drift apart."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# A version with a published hole that matters here, and one without. docs/security.md says what each was.
HOLES = {
    "aiohttp": ("3.14.2", "3.14.3"),
    "fsspec": ("2026.4.0", "2026.6.0"),
    "h11": ("0.14.0", "0.16.0"),
    "jinja2": ("3.1.5", "3.1.6"),
    "pillow": ("12.2.0", "12.3.0"),
    "pyarrow": ("23.0.0", "24.0.0"),
    "ray": ("2.53.0", "2.54.0"),
    "requests": ("2.32.5", "2.33.0"),
    "starlette": ("1.3.0", "1.3.1"),
    "torch": ("2.9.1", "2.10.0"),
    "transformers": ("5.9.0", "5.10.0"),
    "urllib3": ("2.6.3", "2.7.0"),
}


def declared() -> list[Requirement]:
    """All requirements, of all extras, that hold on this platform; without the extras that name our own."""
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    found = [Requirement(text) for text in texts]
    return [each for each in found if each.name != PROJECT["name"] and (each.marker is None or each.marker.evaluate())]


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name", HOLES)
def test_floors_are_above_the_published_holes(name: str) -> None:
    before, first = HOLES[name]
    found = [each for each in declared() if each.name == name]
    assert found, f"{name} is not declared, so whatever brings it decides its version"
    for requirement in found:
        assert before not in requirement.specifier and first in requirement.specifier, str(requirement)
    assert f"| {name} | {first} |" in (ROOT / "docs/security.md").read_text()


def test_constraints_are_plain_pins() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"{line}: no name==version of an ordinary index"
    assert not {PROJECT["name"], "pip", "setuptools"} & set(pinned())


def test_constraints_satisfy_all_that_is_declared() -> None:
    """Where this fails after a change of pyproject.toml: `make constraints`."""
    versions = pinned()
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        if name == "vllm" and name not in versions:  # of machines with CUDA
            continue
        assert name in versions, f"constraints.txt has no {name}: make constraints"
        assert versions[name] in requirement.specifier, f"{requirement}, constraints.txt has {versions[name]}"


def test_what_is_installed_satisfies_all_that_is_declared() -> None:
    for requirement in declared():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        assert Version(version).public in requirement.specifier, f"{requirement}, {version} is installed"


def test_what_tests_import_is_declared_once() -> None:
    """Floors of what an extra has stand in that extra alone; `dev` names the extra."""
    own = {each.name for each in map(Requirement, PROJECT["dependencies"])}
    development = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
    extras = next(each.extras for each in development if each.name == PROJECT["name"])
    elsewhere = {Requirement(text).name for extra in extras for text in PROJECT["optional-dependencies"][extra]}
    assert not (own | elsewhere) & {each.name for each in development}
