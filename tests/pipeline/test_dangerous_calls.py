"""The sources hold no call that turns data into code or commands, but for those below, each with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("manifests", "models", "stages", "trainer", "pipeline")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))])
FORBIDDEN = (
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "runpy.*", "code.*", "codeop.*"),
    *("os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "pty.*", "subprocess.*"),
    *("asyncio.create_subprocess_*", "commands.*"),
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.*",
        "shelve.*",
        "dill.*",
        "cloudpickle.*",
        "joblib.*",
    ),
    *("yaml.load", "yaml.load_all", "yaml.full_load*", "yaml.unsafe_load*"),
    *("torch.load", "torch.hub.*", "numpy.load", "pandas.read_pickle"),
    *("tempfile.mktemp", "os.tempnam", "shutil.unpack_archive", "*.extractall", "os.chmod", "*.chmod", "os.umask"),
    *("urllib.request.*",),
)
# A keyword that makes such a call harmless.
SAFE = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
ALLOWED = {
    (
        "models/worker_process.py",
        "pickle.loads",
    ): "a process and its own children, over an inherited socket pair",
    ("models/worker_process.py", "subprocess.Popen"): "this Python, with code of ours and a number",
    ("models/torchvision_shim.py", "subprocess.run"): "this Python, with code of ours",
    ("manifests/import_path.py", "importlib.import_module"): "what a command line or a recipe names, never data",
    ("pipeline/commands/doctor.py", "importlib.import_module"): "torch, and only where it is asked for",
    ("pipeline/chain/run.py", "subprocess.Popen"): "capipe, by its recipe, whose author is trusted; no shell",
    ("pipeline/inspect/gpu_driver.py", "subprocess.run"): "nvidia-smi, with fixed words",
    ("models/tiny/train/architectures.py", "?.chmod"): "the bundled weights are everybody's to read",
    ("trainer/recipe_file.py", "yaml.load"): "with a loader that is a SafeLoader within bounds",
}


def imported(tree: ast.AST) -> dict[str, str]:
    """What local names stand for: ``np`` for ``numpy``, ``loads`` for ``pickle.loads``."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                top = name.name.partition(".")[0]
                found[name.asname or top] = name.name if name.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def called(node: ast.Call, names: dict[str, str]) -> str:
    """The full name of what is called; a method of anything but a module begins with ``?``."""
    parts: list[str] = []
    at: ast.expr = node.func
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    if isinstance(at, ast.Name) and (at.id in names or not parts):
        return ".".join([names.get(at.id, at.id), *reversed(parts)])
    return ".".join(["?", *reversed(parts)])


def keyword(node: ast.Call, name: str) -> object:
    """A keyword's constant; what is no constant is its source."""
    value = next((each.value for each in node.keywords if each.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value and ast.unparse(value)


def faults(code: str) -> Iterator[str]:
    """What a source calls that it should not."""
    tree = ast.parse(code)
    names = imported(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node, names)
        harmless = name in SAFE and keyword(node, SAFE[name][0]) is SAFE[name][1]
        if not harmless and any(fnmatchcase(name, pattern) for pattern in FORBIDDEN):
            yield name
        if keyword(node, "shell") not in (None, False):
            yield f"{name}(shell=)"
        remote = keyword(node, "trust_remote_code")
        automatic = name.startswith("transformers.Auto") and name.endswith(".from_pretrained")
        if remote is not False and (automatic or remote is not None):
            yield f"{name}(trust_remote_code=)"


def test_no_source_runs_data() -> None:
    found = {(str(file.relative_to(ROOT)), name) for file in SOURCES for name in faults(file.read_text())}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "allowed, and not there any more"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("eval(text)", "eval"),
        ("import os as o\no.system(text)", "os.system"),
        ("from pickle import loads as read\nread(data)", "pickle.loads"),
        ("import torch\ntorch.load(file)", "torch.load"),
        ("import torch\ntorch.load(file, weights_only=safe)", "torch.load"),
        ("import numpy as np\nnp.load(file, allow_pickle=True)", "numpy.load"),
        ("import yaml\nyaml.load(text, yaml.Loader)", "yaml.load"),
        ("import subprocess\nsubprocess.check_output([text])", "subprocess.check_output"),
        ("run(text, shell=True)", "run(shell=)"),
        ("tar.open().extractall(folder)", "?.extractall"),
        ("Path(text).chmod(0o777)", "?.chmod"),
        (
            "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(path)",
            "transformers.AutoTokenizer.from_pretrained(trust_remote_code=)",
        ),
        ("load(path, trust_remote_code=remote)", "load(trust_remote_code=)"),
    ],
)
def test_the_search_finds(code: str, name: str) -> None:
    assert list(faults(code)) == [name]


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "import re\nre.compile(text)",
        "import torch\ntorch.compile(model)\ntorch.load(file, weights_only=True)",
        "import numpy as np\nnp.load(file, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "load(path, trust_remote_code=False)",
    ],
)
def test_the_search_leaves(code: str) -> None:
    assert list(faults(code)) == []


def test_the_loader_of_recipes_is_a_safe_one() -> None:
    import yaml

    from capipe.trainer.recipe_file import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in _Loader.yaml_constructors)
