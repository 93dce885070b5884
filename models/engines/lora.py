"""Adapters (LoRA and other peft methods), merged into the weights that an engine loads.

Merged once, in float32, into a folder of the cache, so that both engines use exactly the same weights, tokens cost no
more than the plain model's, and nothing depends on which adapters an engine can serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import BadInput, Missing, RunFailed
from ...manifests.files.locks import wait_for
from ...manifests.files.storage import clear, open_own
from ..model_json import read_json
from ..own_code import ask_nothing

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CACHE_VARIABLE = "CAPIPE_CACHE"
NAME = "default"
DONE = "merged.json"  # written last
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack")


def check_adapter(name: str) -> Path:
    """The folder of an adapter. Raises Missing where there is none, BadInput where it cannot be merged."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise Missing(f"--adapter {name}: no such folder; download the adapter, and name its folder")
    if not (folder / CONFIG).is_file():
        inside = next((path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}"))), None)
        mend = f"name {folder / inside}" if inside else "name the folder of a peft adapter"
        raise BadInput(f"--adapter {name}: the folder has no {CONFIG}; {mend}")
    if not (folder / WEIGHTS).is_file():
        pickled = " (a pickle may run code when it is read: save it as safetensors)" * (folder / PICKLED).is_file()
        raise BadInput(f"--adapter {name}: the folder has no {WEIGHTS}{pickled}")
    read_json(folder / CONFIG)
    if find_spec("peft") is None:
        raise BadInput(f"--adapter {name}: peft is not installed; pip install 'capipe[lora]'")
    return folder.resolve()


def merged_folder(base: Path, adapter: Path, dtype: str) -> Path:
    """The folder of ``base`` with the adapter merged into its weights, created where the cache has none.

    ``dtype``: the engine's, ``auto``: bfloat16 on CUDA, float32 on a CPU; the merged weights are rounded to it once.
    Raises BadInput for an adapter that is not of this model.
    """
    import torch

    from .model_folder import folder_digest

    folder = check_adapter(str(adapter))
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise BadInput(f"--adapter {adapter}: {base} is quantised, and nothing is merged into such weights")
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    facts = {"base": folder_digest(base), "adapter": folder_digest(folder), "dtype": dtype}
    merged = cache() / "merged" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    if not (merged / DONE).is_file():
        with _locked(merged):
            if not (merged / DONE).is_file():  # another worker may have made it meanwhile
                _make(base, folder, getattr(torch, dtype), merged, facts)
    return merged


def cache() -> Path:
    """Cache folder for what is computed from models: $CAPIPE_CACHE, by default ``capipe`` in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(named) if named else Path(home) / "capipe").expanduser()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time create a folder; the kernel frees the lock of one that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open_own(folder.parent / f"{folder.name}.lock")
    except OSError as error:
        raise RunFailed(
            f"{folder.parent}: cannot be written ({error}); set {CACHE_VARIABLE} to another folder"
        ) from None
    try:
        wait_for(lock, str(folder))
        yield
    finally:
        os.close(lock)


def _make(base: Path, adapter: Path, dtype: Any, merged: Path, facts: dict[str, str]) -> None:
    from ..pretrained import without_bars
    from .hf.engine import load_model
    from .model_folder import image_grid

    model: Any = load_model(str(base), sees=image_grid(base) is not None, dtype="float32", device="cpu")
    model = merge(model, adapter)
    partial = merged.with_suffix(".partial")
    clear(partial)  # left by a killed process
    try:
        partial.mkdir()
        for file in sorted(base.iterdir()):
            if file.is_file() and file.suffix not in WEIGHT_FILES and not file.name.endswith(".index.json"):
                shutil.copyfile(file, partial / file.name)
        model.config.dtype = dtype
        weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        with without_bars():
            model.save_pretrained(partial, state_dict=weights)
        (partial / DONE).write_text(json.dumps(facts))
        clear(merged)
        partial.replace(merged)
    except OSError as error:
        clear(partial)
        raise RunFailed(f"{merged}: cannot be written ({error}); set {CACHE_VARIABLE} to a folder with room") from None


def merge(model: Any, adapter: Path) -> Any:
    """The model with an adapter merged into its weights. Raises BadInput where they do not fit together."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise BadInput(f"--adapter {adapter}: peft does not import ({error}); pip install 'capipe[lora]'") from None

    ask_nothing()
    try:
        config: Any = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type.value} adds to prompts and cannot be merged into weights")
        peft_model: Any = PeftModel(model, config, NAME)
        loaded = peft_model.load_adapter(str(adapter), NAME, torch_device="cpu")
        strange = [*loaded.unexpected_keys, *loaded.missing_keys]
        if strange:
            word = "knows no" if loaded.unexpected_keys else "would need a"
            raise ValueError(f"the model {word} {strange[0]}")
        return peft_model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        # ValueError: no such layers; RuntimeError: weights of another shape; the rest: files that are no adapter's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "size mismatch" in line), lines[0])
        kind = type(model).__name__
        raise BadInput(f"--adapter {adapter}: is no adapter of this {kind} ({reason[:300]}); name its base") from None
