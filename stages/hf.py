"""Hugging Face datasets as a source: a folder written by ``save_to_disk``, or one loaded by name.

Apart from :mod:`.items`, because importing ``datasets`` takes seconds. Images stay encoded (``decode=False``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets

from ..errors import BadInput
from .items import TEXT_COLUMNS, DatasetRef, Item, read_file

SCHEME = "hf://"
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")


def refs(src: str) -> Iterator[DatasetRef]:
    """Every row of a dataset. ``src``: a saved folder, or ``hf://name[:split]`` (all splits unless one is named).

    Raises BadInput at once where it cannot be loaded or has no column of images.
    """
    location, splits = _splits(src)
    for split, dataset in splits.items():
        image_column(dataset, f"{location}:{split}")
    return (
        DatasetRef(location, split, index, str(dataset._fingerprint))
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
            return datasets.load_dataset(location.removeprefix(SCHEME))
        return datasets.load_from_disk(location)
    except Exception as error:  # loaders and hubs raise whatever they like; the user needs the name and the reason
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{location}: cannot be loaded as a dataset ({reason})") from error


class Split:
    """One split as :func:`refs` saw it, its images left encoded."""

    def __init__(self, location: str, split: str) -> None:
        dataset = _splits(location)[1][split]
        self._column = image_column(dataset, location)
        self._dataset = dataset.cast_column(self._column, datasets.Image(decode=False))

    def read(self, index: int, source: str) -> Item:
        row: dict[str, Any] = self._dataset[index]
        item = Item(source)
        image = row.pop(self._column) or {}
        item.data = image.get("bytes")
        if item.data is None and image.get("path"):
            item.data, item.problem = read_file(image["path"])
        column = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
        item.text = row.pop(column) if column else None
        item.url = row["url"] if isinstance(row.get("url"), str) else None
        item.meta = row
        return item


def image_column(dataset: datasets.Dataset, where: str) -> str:
    """The column of type Image; else one of the usual names. Raises BadInput where there is none."""
    features = dataset.features
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in IMAGE_COLUMNS if name in features]
    if len(typed) > 1 and not set(typed) & set(named):
        raise BadInput(f"{where}: several columns of images ({', '.join(typed)}); rename the one to take to 'image'")
    found = [name for name in named if name in typed] or typed or named
    if not found:
        raise BadInput(f"{where}: no column of images; its columns are {', '.join(features)}")
    return found[0]
