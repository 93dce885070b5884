"""Model folders: resolving their names, digests of their content, and the image sizes they take."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ..bundled import resolve as resolve_bundled
from ..hub import hub_name, snapshot
from ..images.grid import ImageGrid
from ..model_json import read_json
from .captioner_registry import kind_of, one_size

# Files that define a model; images, readmes and licences beside them do not count.
IDENTIFYING = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
CHUNK_BYTES = 1 << 22


def resolve_model(name: str) -> Path:
    """The folder of a bundled model, a folder or a hub id (``org/name`` or ``org/name@revision``, downloaded).

    Raises BadInput.
    """
    try:
        path = Path(resolve_bundled(name)).expanduser()
    except ValueError as error:
        raise BadInput(str(error)) from error
    if path.is_dir():
        if not (path / "config.json").is_file():
            fix = "name the one of a Hugging Face model"
            if (path / "trainer.json").is_file():
                fix = "name the last or the best checkpoint of the run, or train with model_files: every"
            raise BadInput(f"{name}: the folder has no config.json; {fix}")
        return path.resolve()
    named = hub_name(name)
    if path.exists() or named is None:
        raise BadInput(f"{name}: no such model folder; give a folder, a Hugging Face id or a bundled tiny/ model")
    return snapshot(named)


def image_grid(model_path: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageGrid | None:
    """The model's pixel grid from its processor's configuration; None for a text-only model.

    The caller's limits override the processor's. Raises BadInput where no image could lie within them.
    """
    if kind_of(model_path) is not None:
        return one_size(model_path, min_pixels, max_pixels)
    if "vision_config" not in read_json(model_path / "config.json"):
        return None
    processor = _image_processor_config(model_path)
    size = processor.get("size") or {}
    lowest = processor.get("min_pixels") or size.get("shortest_edge")
    highest = processor.get("max_pixels") or size.get("longest_edge")
    patch = processor.get("patch_size")
    if not (lowest and highest and patch):
        raise BadInput(f"{model_path}: its image processor has no patch_size or pixel limits, as Qwen-VL's have")
    factor = int(patch) * int(processor.get("merge_size", 2))
    highest = max_pixels or int(highest)
    if min_pixels is not None and min_pixels > highest:
        raise BadInput(f"min_pixels {min_pixels} is above max_pixels {highest}")
    if highest < factor * factor:
        raise BadInput(f"max_pixels {highest} is less than one cell of the model's grid, {factor} x {factor}")
    return ImageGrid(factor, min(min_pixels or int(lowest), highest), highest)


def _image_processor_config(model_path: Path) -> dict[str, Any]:
    """The image processor's configuration; of the two possible files the newer wins, as in transformers."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (model_path / name).is_file():
            written = read_json(model_path / name)
            config = written.get("image_processor", written)
            if "patch_size" in config:
                return dict(config)
    raise BadInput(f"{model_path}: a vision model without a preprocessor_config.json; add the original's")


def content_digest(folder: Path) -> str:
    """The commit of a folder in the hub's cache, which is named after it; otherwise :func:`folder_digest`."""
    return folder.name if folder.parent.name == "snapshots" else folder_digest(folder)


def folder_digest(folder: Path) -> str:
    """sha256, in hex, over names and contents of the files that define the model; the folder's name does not count."""
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in IDENTIFYING):
        content = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                content.update(chunk)
        digest.update(f"{path.relative_to(folder).as_posix()} {content.hexdigest()}\n".encode())
    return digest.hexdigest()
