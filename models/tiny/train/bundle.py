"""Put an exported model among the bundled ones: ``python -m capipe.models.tiny.train.bundle EXPORT NAME``.

``models/tiny/NAME`` gets the export's files and keeps its card (README.md). A vision encoder of one of :data:`VISION`
becomes a file of its own, in the format of sharded weights; of bundled models with equal ones, the first in
:data:`NAMES` has the file and the others a relative symbolic link to it. So frozen encoders lie in the repository once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ....errors import BadInput
from ...bundled import CONFIGS, NAMES, UNTRAINED, folder_of
from ...hub import weight_map
from ...model_json import read_json

ROOT = folder_of("captioner").parent
VISION = {"qwen2_5_vl": "visual.", "blip-2": "vision_model."}  # prefix of the vision encoder's weights, by model_type
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REST_FILE, VISION_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CARD = "README.md"


def bundle(export: Path, name: str, root: Path = ROOT) -> None:
    """Copy an exported folder to ``root/name``, its vision encoder apart, and link equal ones.

    ``export`` may be the bundled folder itself. Raises BadInput for a folder without a model, or with files that cannot
    be read; nothing has changed then.
    """
    if not any((export / config).is_file() for config in CONFIGS):
        raise BadInput(f"{export}: no exported model: it has none of {', '.join(CONFIGS)}")
    target = root / name
    with tempfile.TemporaryDirectory(dir=root, prefix=".bundle-") as temporary:
        made, old = Path(temporary) / "made", Path(temporary) / "old"
        try:
            shutil.copytree(export, made)  # follows links: an export may be a bundled folder
        except OSError as error:
            raise BadInput(f"{export}: cannot be copied ({error}); export the model again") from None
        split_vision(made)
        if (target / CARD).is_file():
            shutil.copyfile(target / CARD, made / CARD)
        for file in linked_to(target / VISION_FILE, root):
            replace_by_copy(file)  # which the folder's new weights must not change
        if target.exists():
            target.rename(old)
        made.rename(target)
    link_equal(root)


def split_vision(folder: Path) -> None:
    """Write a folder's weights as two files and an index, if its model type is in :data:`VISION`. Raises BadInput."""
    config = folder / "config.json"
    prefix = VISION.get(read_json(config).get("model_type", "")) if config.is_file() else None
    if prefix is None:
        return
    tensors = load_tensors(folder)
    parts: dict[str, dict[str, Tensor]] = {REST_FILE: {}, VISION_FILE: {}}
    for weight, tensor in tensors.items():
        parts[VISION_FILE if weight.startswith(prefix) else REST_FILE][weight] = tensor
    if not parts[VISION_FILE]:
        raise BadInput(f"{folder.name}: has no weights called {prefix}*, which its model_type has")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for name, part in parts.items():
        content = save(part, metadata={"format": "pt"})  # save_file would make it readable by its owner only
        (folder / name).write_bytes(content)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {weight: name for name, part in parts.items() for weight in sorted(part)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a transformers folder, in one file or in several. Raises BadInput."""
    files = sorted(set(weight_map(folder / INDEX).values())) if (folder / INDEX).is_file() else [WHOLE]
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{folder / name}: no weights that can be read ({error}); export the model again") from None
    return tensors


def link_equal(root: Path) -> None:
    """Make each vision encoder's file a link to the first equal one, in the order of :data:`NAMES`."""
    first: dict[str, Path] = {}
    for file in vision_files(root):
        held = first.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
        if held is file:
            replace_by_copy(file)
        else:
            link = file.with_name(f".{file.name}")
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(held, file.parent))
            link.replace(file)


def linked_to(held: Path, root: Path) -> list[Path]:
    """Vision encoders' files that are links to ``held``."""
    return [file for file in vision_files(root) if file.is_symlink() and file.resolve() == held.resolve()]


def replace_by_copy(link: Path) -> None:
    """Replace a link by a copy of its file; a file stays as it is."""
    if link.is_symlink():
        copy = link.with_name(f".{link.name}")
        shutil.copyfile(link, copy)
        copy.replace(link)


def vision_files(root: Path) -> Iterator[Path]:
    """Files of vision encoders, of bundled models that have one apart, in the order of :data:`NAMES`."""
    return (file for name in NAMES if (file := root / name / VISION_FILE).is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a folder that build wrote")
    parser.add_argument("name", choices=(*NAMES, *UNTRAINED), metavar="NAME", help="the bundled model, without tiny/")
    options = parser.parse_args(arguments)
    try:
        bundle(options.export, options.name, ROOT)
    except BadInput as error:
        parser.error(str(error))
    print(report(options.name, ROOT))
    return 0


def report(name: str, root: Path) -> str:
    """Where a bundled model's weights lie, in one line."""
    file = root / name / VISION_FILE
    if not file.is_file():
        return f"tiny/{name}: bundled whole"
    if file.is_symlink():
        return f"tiny/{name}: bundled; its vision encoder is the file of tiny/{file.resolve().parent.name}"
    others = [f"tiny/{each.parent.name}" for each in linked_to(file, root)]
    return f"tiny/{name}: bundled with its vision encoder, " + (
        f"to which {', '.join(others)} links" if others else "which no other bundled model has"
    )


if __name__ == "__main__":
    raise SystemExit(main())
