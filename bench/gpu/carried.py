"""What a machine with only torch and transformers lacks: wheels that travel along, and stand-ins for TRL's imports.

Wheels are pure Python and are unpacked, not installed; of packages that the machine has, its own are used.

TRL imports `datasets`, `pyarrow` and `pandas` at its start. Of `datasets` a GRPOTrainer uses the class of its training
set, in checks of types, and its rows by number; of the other two a training step uses nothing. Where `datasets` cannot
be imported (it needs pyarrow, 45 MB of compiled code), :func:`stand_in` puts modules with just that in their place.
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def unpack(wheels: Path, site: Path) -> list[str]:
    """Unpack the wheels for this Python whose package the machine lacks into ``site``; returns their names."""
    carried = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, tag = package_of(wheel)
        if tag in tags() and find_spec(name) is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            carried.append(f"{name} {version}")
    return carried


def package_of(wheel: Path) -> tuple[str, str, str]:
    """Package, version and Python tag of a wheel's file name. Raises ValueError for one with compiled code."""
    name, version, *_, tag, abi, platform = wheel.stem.split("-")
    if (abi, platform) != ("none", "any"):
        raise ValueError(f"{wheel.name}: compiled for {abi} and {platform}; only pure Python can be carried")
    return name, version, tag


def tags() -> tuple[str, ...]:
    """Python tags of pure wheels that run here."""
    return ("py3", "py2.py3", f"py3{sys.version_info.minor}")


class Rows:
    """`datasets.Dataset` as far as a GRPOTrainer needs it: rows by number."""

    cache_files = ()  # none of them is on disk

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    @classmethod
    def from_dict(cls, columns: Mapping[str, Sequence[Any]]) -> Rows:
        names, values = list(columns), zip(*columns.values(), strict=True)
        return cls([dict(zip(names, row, strict=True)) for row in values])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._rows[number]


#: Modules that TRL imports beside `datasets`, with the names that stand in annotations there; none is called in a step.
IMPORTED = {
    "pyarrow": ("Array", "Table"), "pyarrow.compute": (), "pyarrow.types": (), "pandas": ("DataFrame",),
}  # fmt: skip
OTHER_SETS = ("DatasetDict", "IterableDataset", "IterableDatasetDict")  # which the training set is not


def stand_in() -> list[str]:
    """Put stand-ins for what TRL imports and this machine cannot; returns their names."""
    try:
        importlib.import_module("datasets")
    except (ImportError, AttributeError):  # absent, or of another version than its parts
        for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
            del sys.modules[name]
    else:
        return []
    missing = {"datasets"} | {name for name in ("pyarrow", "pandas") if find_spec(name) is None}
    _put("datasets", Dataset=Rows, **{name: type(name, (), {}) for name in OTHER_SETS})
    _put("datasets.fingerprint", Hasher=type("Hasher", (), {}))
    for module, names in IMPORTED.items():
        if module.split(".")[0] in missing:
            _put(module, **{name: type(name, (), {}) for name in names})
    return sorted(missing)


def _put(name: str, **members: Any) -> None:
    module = ModuleType(name, "Stand-in for an import; see bench/gpu/carried.py.")
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
