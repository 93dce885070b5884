"""Names and folders of the bundled models (``tiny/captioner``). Importing this loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

PREFIX = "tiny/"
NAMES: tuple[str, ...] = (
    "captioner", "teacher", "reader", "holdout-reader", "clip", "eval-clip", "itm", "vit-gpt2", "blip2", "opt",
    "vgg", "diffusion",
)  # fmt: skip
UNTRAINED = ("blip", "narrow")  # can be trained; their weights are not bundled
CONFIGS = ("config.json", "open_clip_config.json", "model_index.json")  # of transformers, open_clip and diffusers


def folder_of(model: str) -> Path:
    """The weights folder of one of :data:`NAMES`, whether or not it exists."""
    return Path(__file__).resolve().parent / "tiny" / model


def is_bundled(model: str) -> bool:
    """Whether the weights of one of :data:`NAMES` exist."""
    return any((folder_of(model) / config).is_file() for config in CONFIGS)


def resolve(name: str) -> str:
    """The absolute folder of a bundled model (``tiny/captioner``); any name outside ``tiny/`` is returned unchanged.

    Raises ValueError for a ``tiny/`` name that is unknown (listing the known ones) or whose weights are missing.
    """
    if not name.startswith(PREFIX):
        return name
    model = name.removeprefix(PREFIX)
    if model not in (*NAMES, *UNTRAINED):
        known = ", ".join(PREFIX + bundled for bundled in NAMES)
        raise ValueError(f"no bundled model is called {name!r}; the known ones are: {known}")
    if not is_bundled(model):
        mend = f"train it: python -m capipe.models.tiny.train.build {model} --minutes 60"
        raise ValueError(f"{name}: its weights are not here; {mend}")
    return str(folder_of(model))
