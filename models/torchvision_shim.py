"""Fixes environments where PyPI's torchvision or torchaudio, linked against CUDA, is beside a CPU-only torch.

torchvision: its Python side registers fake kernels for the operators ``nms`` and ``qnms``, whose schemas the CUDA
library would have defined; without that library the import fails with "operator torchvision::nms does not exist".
Defining the two schemas first is enough for the transforms that processors use (the operators stay unusable).
torchaudio and torchcodec: nothing here needs them, but transformers imports them when it finds them, and fails; they
are hidden. So is triton beside a CPU-only torch, for which it compiles nothing: every process of vLLM's would log that.
It stays visible where ``TRITON_INTERPRET=1`` is set: its interpreter runs kernels on a CPU. All this has to happen in
every process, vLLM's children included, so a ``.pth`` file activates it.

``python -m capipe.models.torchvision_shim`` tries the imports and installs the hook only where one fails; the set-up
runs it. This file is copied as it is, so it must not import anything of capipe.
"""

from __future__ import annotations

import importlib.abc
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULE = "capipe_torchvision_shim"
UNUSED = ("torchaudio", "torchcodec")
_libraries: list[Any] = []  # torch unregisters the schemas when their Library is collected


class SchemaHook(importlib.abc.MetaPathFinder):
    """Defines the missing schemas when torchvision is first imported, then removes itself; finds no modules."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


def activate(schemas: bool, hidden: Sequence[str]) -> None:
    """Called from the ``.pth`` in every interpreter of the environment (twice where ``site`` reads a folder twice)."""
    if schemas and not any(isinstance(finder, SchemaHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, SchemaHook())
    for name in hidden:
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            continue
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own mark for "cannot be imported"


def import_error(name: str) -> str | None:
    """The error of importing ``name`` in a fresh interpreter; None where it imports, or is absent or hidden."""
    code = f"import importlib.util as u\nif u.find_spec({name!r}): import {name}"
    return complaint(code)


def complaint(code: str) -> str | None:
    """The last line of the error output of a fresh interpreter that fails on ``code``; None where it does not fail."""
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if probe.returncode == 0 else (probe.stderr.strip().splitlines() or ["unknown error"])[-1]


def install(schemas: bool, hidden: Sequence[str]) -> Path:
    """Copy this module and a ``.pth`` that activates it into the environment's site-packages; returns the ``.pth``."""
    site = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, site / f"{MODULE}.py")
    pth = site / f"{MODULE}.pth"
    pth.write_text(f"import {MODULE}; {MODULE}.activate({schemas}, {tuple(hidden)})\n")
    return pth


def main() -> int:
    """Try the imports, fix them, try again. Exit status 1 where an import still fails."""
    (Path(sysconfig.get_paths()["purelib"]) / f"{MODULE}.pth").unlink(missing_ok=True)  # test without the hook
    vision = import_error("torchvision")
    if vision is not None and "operator torchvision::" not in vision:
        print(f"capipe: torchvision does not import, and not for the reason we can fix: {vision}", file=sys.stderr)
        return 1
    broken = {name: error for name in UNUSED if (error := import_error(name)) is not None}
    if complaint("import torch, importlib.util as u; assert u.find_spec('triton') and not torch.version.cuda") is None:
        broken["triton"] = "it has no CPU backend; TRITON_INTERPRET=1 shows it"
    if vision is None and not broken:
        return 0
    pth = install(vision is not None, list(broken))
    if vision is not None:
        print(f"capipe: torchvision did not import beside this torch ({vision}); installed a hook, {pth}")
    for name, error in broken.items():
        print(f"capipe: {name} does not work beside this torch and is not needed ({error}); hidden by {pth}")
    still = import_error("torchvision")
    if still is not None:
        print(f"capipe: torchvision still does not import: {still}", file=sys.stderr)
    return int(still is not None)


if __name__ == "__main__":
    raise SystemExit(main())
