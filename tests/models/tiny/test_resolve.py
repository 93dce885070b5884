from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from capipe.models.bundled import CONFIGS, NAMES, resolve


@pytest.mark.parametrize("model", NAMES)
def test_bundled_names_become_folders(model: str) -> None:
    folder = Path(resolve(f"tiny/{model}"))
    assert folder.is_absolute() and any((folder / config).is_file() for config in CONFIGS)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10e6


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-3B-Instruct", "/models/tiny/captioner", "./tiny", "tiny"])
def test_other_names_are_returned_unchanged(name: str) -> None:
    assert resolve(name) == name


def test_missing_weights_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("capipe.models.bundled.folder_of", lambda model: tmp_path / model)
    with pytest.raises(ValueError, match=r"capipe\.models\.tiny\.train\.build reader"):
        resolve("tiny/reader")


@pytest.mark.parametrize("name", ["tiny/", "tiny/captoiner", "tiny/captioner/x"])
def test_unknown_tiny_names_tell_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="tiny/captioner") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, capipe.models.bundled as b; b.resolve('tiny/captioner'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
