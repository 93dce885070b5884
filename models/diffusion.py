"""Text-to-image with a diffusers pipeline: a folder or a hub id, safetensors weights only, no custom code is run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .bundled import resolve as resolve_bundled
from .engines.plain_text import plain_text
from .hub import PIPELINE, hub_name
from .model_json import read_json
from .own_code import ask_nothing, reason_in_words
from .pretrained import load_reported, refuse_random
from .scorers.base import device_and_type

INDEX = PIPELINE
OWN = "PixelDiffusionPipeline"


class Painter:
    """Generates images from (text, seed) pairs; the same in any batch, except for float rounding.

    ``size``: height and width in pixels; None for the pipeline's own.
    """

    def __init__(self, pipeline: Any, steps: int, guidance: float, size: int | None = None, batch: int = 8) -> None:
        self._pipeline, self._batch = pipeline, batch
        named = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
        self._plain = plain_text(*named)
        self._settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
        if size is not None:
            self._settings |= {"height": size, "width": size}
        pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def paint(self, wanted: Sequence[tuple[str, int]]) -> Tensor:
        """Images (n, 3, height, width), float32 in [0, 1] on the CPU, of (text, seed) pairs."""
        pictures = []
        for start in range(0, len(wanted), self._batch):
            texts, seeds = zip(*wanted[start : start + self._batch], strict=True)
            drawn = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise for any device
            output = self._pipeline(
                prompt=[*map(self._plain, texts)], generator=drawn, output_type="pt", **self._settings
            )
            pictures.append(output.images.float().cpu())
        return torch.cat(pictures)


def load_painter(
    name: str,
    *,
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> Painter:
    """Load ``tiny/diffusion``, a folder with a ``model_index.json``, or a hub id. Raises BadInput where none loads."""
    need_diffusers()
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    ask_nothing()
    disable_progress_bar()  # the bar for loading its parts
    where, number_type = device_and_type(device, dtype)
    try:
        folder = pipeline_folder(name)
        kind = _pipeline_class(folder, name)
        parts = _parts(folder, name)
        pipeline = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **parts
        )
    except (
        OSError,
        ValueError,
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:  # raised by diffusers for broken pipelines
        reason = " ".join(reason_in_words(error, whole=True).split())
        raise BadInput(f"{name}: does not load as a diffusion pipeline ({reason})") from error
    assert isinstance(pipeline, DiffusionPipeline)
    takes = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in takes or "guidance_scale" not in takes:
        raise BadInput(f"{name}: {type(pipeline).__name__} makes no images from a prompt; name a text-to-image one")
    if size is not None and "height" not in takes:
        raise BadInput(f"{name}: makes images of one size only; leave `size` out")
    return Painter(_placed(pipeline, where, number_type), steps, guidance, size, batch)


def _placed(pipeline: Any, where: torch.device, number_type: torch.dtype) -> Any:
    """The pipeline on its device, cast only where dtypes differ: diffusers warns of every cast."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    differ = any(weight.dtype != number_type for module in modules for weight in module.parameters())
    return pipeline.to(where, number_type) if differ else pipeline.to(where)


def _parts(folder: Path, name: str) -> dict[str, Any]:
    """The pipeline's models with all of their weights; diffusers itself would initialise missing ones with a warning.

    Raises BadInput where some are missing.
    """
    import diffusers
    import transformers

    parts: dict[str, Any] = {}
    for part, entry in read_json(folder / INDEX).items():
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(value, str) for value in entry)):
            continue
        library, named = entry
        home = {"diffusers": diffusers, "transformers": transformers}.get(library)
        kind: Any = getattr(home or getattr(diffusers.pipelines, library, None), named, None)
        if not isinstance(kind, type) or not issubclass(kind, (diffusers.ModelMixin, transformers.PreTrainedModel)):
            continue  # a scheduler, a tokenizer
        called = f"{name}: {part}"
        if issubclass(kind, transformers.PreTrainedModel):
            parts[part], report = load_reported(
                kind, folder / part, dtype=torch.float32, called=called, use_safetensors=True
            )
        else:
            loader: Any = kind
            parts[part], report = loader.from_pretrained(
                folder / part, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        refuse_random(report, called, named)
    return parts


def need_diffusers() -> None:
    """Raises BadInput where diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"reconstruction: diffusers does not import ({error}); pip install 'capipe[diffusion]', or leave it out"
        ) from None


def pipeline_folder(name: str) -> Path:
    """The pipeline's folder, downloaded from the hub where that is allowed. Raises BadInput."""
    from diffusers import DiffusionPipeline

    try:
        path = Path(resolve_bundled(name)).expanduser()
    except ValueError as error:
        raise BadInput(str(error)) from error
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise BadInput(f"{name}: the folder has no {INDEX}; name the one of a diffusers pipeline")
        return path.resolve()
    named = hub_name(name)
    if path.exists() or named is None:
        raise BadInput(f"{name}: no such folder; give one of a diffusers pipeline, a hub id or a bundled tiny/ model")
    try:
        return Path(DiffusionPipeline.download(named.repo, revision=named.revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{name}: neither a folder here nor a pipeline to be had from the hub ({reason})") from error


def _pipeline_class(folder: Path, name: str) -> Any:
    """The class named by the folder, one of diffusers' or our own. Raises BadInput for others, and for custom code."""
    import diffusers

    named = read_json(folder / INDEX).get("_class_name")
    if any(folder.rglob("*.py")) or not isinstance(named, str):
        raise BadInput(f"{name}: brings code of its own, which is not run; name a pipeline of diffusers' own classes")
    if named == OWN:
        from .pixel_diffusion import PixelDiffusionPipeline

        return PixelDiffusionPipeline
    pipeline_class = getattr(diffusers, named, None)
    if pipeline_class is None or not issubclass(pipeline_class, diffusers.DiffusionPipeline):
        raise BadInput(f"{name}: diffusers {diffusers.__version__} has no pipeline {named}")
    return pipeline_class
