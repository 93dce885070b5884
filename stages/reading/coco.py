"""COCO's annotation files: ``images`` with an id and a file name each, ``annotations`` that name them by id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = ["file_name", "captions", "caption"]


def is_captions(whole: Mapping[str, Any]) -> bool:
    """Whether an object has COCO's images and captions of them."""
    return bool(_objects(whole, "images")) and any("caption" in each for each in _objects(whole, "annotations"))


def caption_rows(whole: Mapping[str, Any]) -> Iterator[Mapping[str, Any] | str]:
    """A row for each image in the file's order, ``captions`` all of it, ``caption`` the first, both None if none.

    Then what is wrong with each annotation that names no image of the file.
    """
    captions: dict[Any, list[str]] = defaultdict(list)
    for each in _objects(whole, "annotations"):
        if isinstance(each.get("caption"), str):
            captions[_id(each.get("image_id"))].append(each["caption"])
    for image in _objects(whole, "images"):
        found = captions.get(_id(image.get("id")))
        yield {**image, "captions": found, "caption": found[0] if found else None}
    known = {_id(image.get("id")) for image in _objects(whole, "images")}
    for image_id in captions:
        if image_id not in known:
            yield f"{len(captions[image_id])} captions of an image with id {image_id}, which the file does not list"


def file_names(whole: Mapping[str, Any]) -> dict[Any, str]:
    """The file names of a COCO file's images by their ids."""
    named = [(image.get("id"), image.get("file_name")) for image in _objects(whole, "images")]
    return {_id(image_id): name for image_id, name in named if image_id is not None and isinstance(name, str)}


def _objects(whole: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    values = whole.get(field)
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def _id(value: object) -> str:
    """An id as it is compared: some files have it as a number in one list and as text in the other."""
    return str(value)
