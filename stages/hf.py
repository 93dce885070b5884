"""Hugging Face datasets as a source: a folder written by ``save_to_disk``, or one loaded by name.

Apart from :mod:`.items`, because importing ``datasets`` takes seconds. Images stay encoded (``decode=False``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from ..errors import BadInput
from .columns import IMAGE_COLUMNS, Columns, take_caption
from .items import DatasetRef, Item
from .parquet_images import image_bytes

SCHEME = "hf://"
_REVISION = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)@(\w[\w./-]*)")  # name@branch, tag or commit, as of a model
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOADED: dict[tuple[str, str | None], Any] = {}


def refs(src: str, columns: Columns) -> Iterator[DatasetRef]:
    """Every row of a dataset. ``src``: a saved folder, or ``hf://name[@revision][:split]`` (else all splits).

    Raises BadInput at once where it cannot be loaded, has no column of images or not the text column that is wanted.
    """
    location, splits = _splits(src)
    for split, dataset in splits.items():
        image_column(dataset, f"{location}:{split}")
        columns.check_text(f"{location}:{split}", dataset.features)
    return (
        DatasetRef(location, split, index, str(dataset._fingerprint), columns.text)
        for split, dataset in splits.items()
        for index in range(len(dataset))
    )


def _splits(src: str) -> tuple[str, dict[str, datasets.Dataset]]:
    location, split = src, ""
    if src.startswith(SCHEME):
        name, colon, after = src.removeprefix(SCHEME).rpartition(":")
        location, split = (SCHEME + name, after) if colon else (src, "")
    loaded = _load(location)
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    if split and split not in loaded:
        raise BadInput(f"{src}: no split {split!r}; it has {', '.join(map(str, loaded))}")
    return location, {split: loaded[split]} if split else dict(loaded)


def _load(location: str) -> Any:
    datasets.disable_progress_bars()
    try:
        if location.startswith(SCHEME):
            return _named(location.removeprefix(SCHEME))
        return datasets.load_from_disk(location)
    except Exception as error:  # loaders and hubs raise whatever they like; the user needs the name and the reason
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{location}: cannot be loaded as a dataset ({reason})") from error


def _named(name: str) -> Any:
    """``org/name``, the same ``@revision``, or a local folder in the form of a dataset of the hub."""
    if Path(name).exists():
        return datasets.load_dataset(name)
    found = _REVISION.fullmatch(name)
    return _of_hub(*found.groups()) if found is not None else _of_hub(name, None)


def _of_hub(name: str, revision: str | None) -> Any:
    """A process asks the hub once: a branch that moves meanwhile changes nothing."""
    if (name, revision) not in _LOADED:
        _LOADED[name, revision] = datasets.load_dataset(name, revision=revision)
    return _LOADED[name, revision]


def commits() -> dict[str, str]:
    """The commits of the hub at which this process has loaded datasets, by what was asked for; where `datasets` tells:
    in the names of its files, ``…/name/configuration/version/COMMIT/name-train.arrow``."""
    found: dict[str, str] = {}
    for (name, revision), loaded in _LOADED.items():
        for dataset in loaded.values() if isinstance(loaded, dict) else [loaded]:
            for folder in (Path(file["filename"]).parent.name for file in dataset.cache_files):
                if _COMMIT.fullmatch(folder):
                    found[f"{SCHEME}{name}" if revision is None else f"{SCHEME}{name}@{revision}"] = folder
    return found


class Split:
    """One split as :func:`refs` saw it, its images left encoded."""

    def __init__(self, location: str, split: str) -> None:
        dataset = _splits(location)[1][split]
        self._column = image_column(dataset, location)
        image, listed = datasets.Image(decode=False), _of_list(dataset.features[self._column]) is not None
        self._dataset = dataset.cast_column(self._column, datasets.Sequence(image) if listed else image)

    def read(self, index: int, source: str, text_column: str | None) -> Item:
        row: dict[str, Any] = self._dataset[index]
        item = Item(source)
        item.data, item.problem = image_bytes(row.pop(self._column), self._column)
        item.text, whole = take_caption(row, text_column)
        item.url = row["url"] if isinstance(row.get("url"), str) else None
        item.meta = {name: value for name, value in row.items() if name != whole}
        return item


def image_column(dataset: datasets.Dataset, where: str) -> str:
    """The column of type Image, or of lists of it; else one of the usual names. Raises BadInput where there is none."""
    features = dataset.features
    kinds = {name: _of_list(feature) or feature for name, feature in features.items()}
    typed = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    named = [name for name in IMAGE_COLUMNS if name in features]
    if len(typed) > 1 and not set(typed) & set(named):
        raise BadInput(f"{where}: several columns of images ({', '.join(typed)}); rename the one to take to 'image'")
    found = [name for name in named if name in typed] or typed or named
    if not found:
        raise BadInput(f"{where}: no column of images; its columns are {', '.join(features)}")
    return found[0]


def _of_list(feature: Any) -> Any:
    """What a list is of; None for any other feature. `datasets` has had three ways to write one."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)
