"""The bundled models' names (``tiny/captioner``) and folders. Importing this loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

PREFIX = "tiny/"
NAMES: tuple[str, ...] = (
    "captioner", "teacher", "reader", "holdout-reader", "clip", "eval-clip", "itm", "vit-gpt2", "blip2", "opt",
    "vgg", "diffusion",
)  # fmt: skip
UNTRAINED = ("blip",)  # can be trained; their weights are not bundled
CONFIGS = ("config.json", "open_clip_config.json", "model_index.json")  # of transformers, of open_clip, of diffusers


def folder_of(model: str) -> Path:
    """Where the weights of one of :data:`NAMES` lie, or are to."""
    return Path(__file__).resolve().parent / "tiny" / model


def is_bundled(model: str) -> bool:
    """Whether the weights of one of :data:`NAMES` are there."""
    return any((folder_of(model) / config).is_file() for config in CONFIGS)


def resolve(name: str) -> str:
    """The absolute folder of a bundled model (``tiny/captioner``); any name outside ``tiny/`` is returned unchanged.

    Raises ValueError for a ``tiny/`` name that is unknown, naming the known ones, or whose weights are not there.
    """
    if not name.startswith(PREFIX):
        return name
    model = name.removeprefix(PREFIX)
    if model not in (*NAMES, *UNTRAINED):
        known = ", ".join(PREFIX + each for each in NAMES)
        raise ValueError(f"no bundled model is called {name!r}; the known ones are: {known}")
    if not is_bundled(model):
        mend = f"train it: python -m capipe.models.tiny.train.build {model} --minutes 60"
        raise ValueError(f"{name}: its weights are not here; {mend}")
    return str(folder_of(model))
