"""The set-up's import hook, in interpreters of its own."""

from __future__ import annotations

from capipe.models.torchvision_shim import complaint, import_error

SHIM = "from capipe.models import torchvision_shim as shim; "


def test_torchvision_imports_in_this_environment() -> None:
    assert import_error("torchvision") is None


def test_one_hook_however_often_it_is_activated() -> None:
    code = SHIM + "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'SchemaHook']; "
    code += "shim.activate(True, ()); shim.activate(True, ()); "
    assert complaint(code + "assert sum(isinstance(f, shim.SchemaHook) for f in sys.meta_path) == 1") is None


def test_hidden_packages_look_absent() -> None:
    code = SHIM + "shim.activate(False, ('colorsys',)); import importlib.util as u; "
    assert complaint(code + "assert u.find_spec('colorsys') is None") is None
    assert "colorsys" in (complaint(code + "import colorsys") or "")


def test_triton_is_hidden_except_from_its_interpreter() -> None:
    code = SHIM + "import os, sys; sys.modules.pop('triton', None); os.environ['TRITON_INTERPRET'] = '{}'; "
    code += "shim.activate(False, ('triton',)); assert ('triton' in sys.modules) is {}"
    assert complaint(code.format(0, True)) is None
    assert complaint(code.format(1, False)) is None
