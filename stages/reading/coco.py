"""COCO annotation files: ``images`` with id and file name, ``annotations`` that refer to images by id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = ["file_name", "captions", "caption"]


def is_captions(whole: Mapping[str, Any]) -> bool:
    """True if an object has COCO images and captions."""
    return bool(_objects(whole, "images")) and any("caption" in entry for entry in _objects(whole, "annotations"))


def caption_rows(whole: Mapping[str, Any]) -> Iterator[Mapping[str, Any] | str]:
    """One row per image in file order: ``captions`` has all captions, ``caption`` the first; both None if none.

    An error for each image id that has captions but is not in the file follows at the end.
    """
    captions: dict[Any, list[str]] = defaultdict(list)
    for entry in _objects(whole, "annotations"):
        if isinstance(entry.get("caption"), str):
            captions[_id(entry.get("image_id"))].append(entry["caption"])
    for image in _objects(whole, "images"):
        texts = captions.get(_id(image.get("id")))
        yield {**image, "captions": texts, "caption": texts[0] if texts else None}
    known = {_id(image.get("id")) for image in _objects(whole, "images")}
    for image_id in captions:
        if image_id not in known:
            yield f"{len(captions[image_id])} captions of an image with id {image_id}, which the file does not list"


def file_names(whole: Mapping[str, Any]) -> dict[Any, str]:
    """Map from image id to file name."""
    named = [(image.get("id"), image.get("file_name")) for image in _objects(whole, "images")]
    return {_id(image_id): name for image_id, name in named if image_id is not None and isinstance(name, str)}


def _objects(whole: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    values = whole.get(field)
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def _id(value: object) -> str:
    """An id normalised to text: some files have numbers in one list and text in the other."""
    return str(value)
