"""Loading through transformers: every load from a folder goes through here; no custom code, no missing weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..errors import BadInput
from .hub import weight_map
from .model_json import read_json
from .own_code import ADVICE, NEEDS_CODE

NAMED = 3  # weights named in a message; the rest are counted
# Parts of a class that nothing here uses, so that their weights may be missing: by model_type.
UNUSED = {"vision-encoder-decoder": (r"encoder\.pooler\.",)}
logger = logging.getLogger(__name__)


def load_weights(loader: Any, path: str | Path, *, dtype: torch.dtype, called: str) -> Any:
    """The model of a folder, on the CPU, with all of its weights: ``loader`` is one of transformers' classes.

    ``called``: the model as the user named it. Weights of no part of the model are logged. Raises BadInput where
    weights are missing or of other shapes, by name, or cannot be read; OSError and ValueError as transformers does for
    files that are missing or of an unknown model.
    """
    model, report = load_reported(loader, path, dtype=dtype, called=called)
    refuse_random(report, called, type(model).__name__, UNUSED.get(model.config.model_type, ()))
    return model


def check_weights(path: Path, called: str) -> None:
    """Raise BadInput where a folder lacks weights of its model, for engines of other libraries; nothing is loaded.

    The files' weights are compared with the model's by transformers on the meta device. For quantised models, and those
    that transformers cannot load, only the index is compared with the files; the engine reports the rest.
    """
    import transformers

    if absent := _absent(path):
        raise BadInput(
            f"{called}: {_counted(absent)} of its index not in its files ({names(absent)}); fetch them again"
        )
    config = read_json(path / "config.json")
    named = next(iter(config.get("architectures") or ()), None)
    loader = getattr(transformers, str(named), None)
    if loader is None or not hasattr(loader, "from_pretrained") or "quantization_config" in config:
        return
    try:
        model, report = load_reported(loader, path, dtype=torch.bfloat16, called=called, device_map={"": "meta"})
    except (OSError, ValueError, ImportError):
        return
    refuse_random(report, called, type(model).__name__, UNUSED.get(model.config.model_type, ()))


def refuse_random(report: Any, called: str, kind: str, unused: Sequence[str] = ()) -> None:
    """Raise BadInput where transformers' ``report`` of loading a ``kind`` lists randomly initialised weights.

    ``unused``: patterns (``re``) of weights that nothing uses. Weights in the files that the model does not have are
    logged in one line.
    """
    pattern = re.compile("|".join(unused)) if unused else None
    missing = [key for key in report["missing_keys"] if pattern is None or not pattern.match(key)]
    if missing:
        raise BadInput(
            f"{called}: {_counted(missing)} of {kind} {'is' if len(missing) == 1 else 'are'} not in its files "
            f"({names(missing)}): it would be computed with random ones; fetch the whole model"
        )
    if report["mismatched_keys"]:
        shapes = {
            key: f"{key}: {_by(there)} there, {_by(wanted)} wanted" for key, there, wanted in report["mismatched_keys"]
        }
        raise BadInput(
            f"{called}: {_counted(shapes)} of another shape than {kind} has by its config.json "
            f"({names(shapes.values())}); weights and config.json are not of one model"
        )
    if report["unexpected_keys"]:
        extra = report["unexpected_keys"]
        logger.warning("%s: %s of no part of %s, left out (%s)", called, _counted(extra), kind, names(extra))


def _absent(path: Path) -> list[str]:
    """Weights that an index assigns to a file that does not have them."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return []
    of_file: dict[str, list[str]] = {}
    for weight, file in weight_map(index).items():
        of_file.setdefault(file, []).append(weight)
    absent: list[str] = []
    for file, weights in of_file.items():
        try:
            with safe_open(path / file, framework="pt") as opened:
                there = set(opened.keys())
        except FileNotFoundError:
            there = set()
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path / file}: is no whole safetensors file ({error}); fetch it again") from error
        absent += [weight for weight in weights if weight not in there]
    return absent


def names(keys: Iterable[str]) -> str:
    """The first few weight names, sorted, and how many more there are."""
    ordered = sorted(keys)
    more = f", and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return f"{', '.join(ordered[:NAMED])}{more}"


def _counted(keys: Any) -> str:
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'}"


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def load_reported(
    loader: Any, path: str | Path, *, dtype: torch.dtype, called: str, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report, for :func:`refuse_random`. Raises BadInput for corrupt weights."""
    from safetensors import SafetensorError

    try:
        with _quiet(), without_bars():
            loaded: tuple[Any, dict[str, Any]] = loader.from_pretrained(
                path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below instead, all of them by name
                trust_remote_code=False,
                weights_only=True,
                local_files_only=True,
                **more,
            )
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise BadInput(f"{called}: its weights cannot be read ({reason}); fetch them again") from error
    except ValueError as error:
        if NEEDS_CODE in str(error):
            raise BadInput(f"{called}: does not load as a model: {ADVICE}") from error
        raise
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses transformers' own table of missing weights, which calls them harmless."""
    of_loading = logging.getLogger("transformers.modeling_utils")

    def passes(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    of_loading.addFilter(passes)
    try:
        yield
    finally:
        of_loading.removeFilter(passes)


@contextmanager
def without_bars() -> Iterator[None]:
    """Suppresses transformers' progress bars of reading and writing weights."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
