"""Refuses sources without any image, judged by the first bytes of their items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.files.outside import Outside, Refused
from ...manifests.samples import is_image
from ...manifests.status import Status
from ...models.images.formats import no_image
from .folder_metadata import CaptionedRef, DescribedRef
from .source_refs import FileRef, Handles, ItemRef, ProblemRef, TableRef, TarRef

_TOLD = 3  # kinds of files listed in an error
_UNPACK = (
    "unpack it first; of archives capipe reads tars alone, also compressed ones (.tar.gz, .tgz, .tar.xz, .tar.zst)"
)
_OUTSIDE = "a path or link that leads out of the source, or out of --within"
_HINTS = {  # hint by kind of file found; the first match is used
    "a Git LFS pointer": "fetch the files that these stand for: git lfs pull",
    "a Parquet file": "load it as a dataset: hf://{source}",
    "Arrow data": "load it as a dataset: name the folder that save_to_disk wrote, or hf://{source}",
    "a tar archive": "name the tars themselves, by a name that ends in .tar",
    "a zip archive": _UNPACK,
    "gzip data": _UNPACK,
    "bzip2 data": _UNPACK,
    "xz data": _UNPACK,
    "zstandard data": _UNPACK,
    _OUTSIDE: "--follow-links takes links and lists of a folder that lead out of it",
    "an HTML page": "a server sent a page in the place of the file: download it again",
}
_ANY = "give a folder of images, tars, a table of paths or hf://name"


@dataclass(slots=True)
class Opened:
    """A source and its items. ``one_of_many``: a single file or tar, as a shell's ``*`` expands to in thousands."""

    name: str
    items: Iterator[ItemRef]
    one_of_many: bool


def with_images(sources: Sequence[Opened]) -> Iterator[ItemRef]:
    """Items of all sources, in order.

    Raises BadInput for a source that is empty or has no item that may be an image; sources that are one of many count
    as one. Only first bytes are read, and only up to the first item that is an image (of a supported format or not) or
    undetermined: damaged and unreadable items become rows, which have the detailed error.
    """
    groups: dict[str, list[Opened]] = {}
    for source in sources:
        groups.setdefault("" if source.one_of_many else source.name, []).append(source)
    with Handles() as handles:
        for group in groups.values():
            _check(group, handles)
    return chain.from_iterable(source.items for source in sources)


def _check(group: Sequence[Opened], handles: Handles) -> None:
    kinds: Counter[str] = Counter()
    for source in group:
        seen: list[ItemRef] = []
        for ref in source.items:
            seen.append(ref)
            kind = _no_image(ref, handles)
            if kind is None:
                source.items = chain(seen, source.items)
                return
            kinds[kind] += 1
        source.items = iter(seen)
    raise BadInput(_refusal(group, kinds))


def _no_image(ref: ItemRef, handles: Handles) -> str | None:
    """Kind of an item that is certainly not an image; None if it may be one."""
    if isinstance(ref, ProblemRef):
        return ref.reason if ref.status is Status.UNSUPPORTED else None
    try:
        head = _head(ref, handles)
    except Refused as refused:
        return _OUTSIDE if isinstance(refused, Outside) else None
    if head == b"":
        return None if is_image(ref.source.lower()) else "an empty file"
    return no_image(head) if head else None


def _head(ref: ItemRef, handles: Handles) -> bytes | None:
    if isinstance(ref, DescribedRef):
        return _head(ref.file, handles)
    if isinstance(ref, CaptionedRef):
        return _head(ref.image, handles)
    try:
        if isinstance(ref, FileRef | TableRef):
            return ref.head()
        if isinstance(ref, TarRef):
            return ref.head(handles)
    except Refused:
        raise
    except Exception:  # remote storage raises errors of any type; the item's row will have it
        return None
    return None  # an item of a dataset, whose column has images


def _refusal(group: Sequence[Opened], counts: Counter[str]) -> str:
    name = group[0].name + (f" and {len(group) - 1} others" if len(group) > 1 else "")
    if not counts:
        return f"{name}: holds no image, it is empty; {_ANY}"
    kinds = [f"{kind} ({count})" if count > 1 else kind for kind, count in counts.most_common(_TOLD)]
    more = ", …" if len(counts) > _TOLD else ""
    total = counts.total()
    text = f"{name}: holds no image: {f'of {total} items ' if total > 1 else ''}{', '.join(kinds)}{more}"
    if "://" not in group[0].name and Artifact.exists(group[0].name):
        return f"{text}; it is an artifact of capipe without images: give the shards that it was made of"
    hint = next((hint for kind, hint in _HINTS.items() if kind in counts), _ANY)
    return f"{text}; {hint.format(source=group[0].name)}"
