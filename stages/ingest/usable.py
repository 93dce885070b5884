"""Whether a source holds images at all, by what its first items look like: success with nothing usable helps nobody."""

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

_TOLD = 3  # kinds of files that a refusal counts
_UNPACK = (
    "unpack it first; of archives capipe reads tars alone, also compressed ones (.tar.gz, .tgz, .tar.xz, .tar.zst)"
)
_OUTSIDE = "a path or link that leads out of the source, or out of --within"
_HINTS = {  # what to do, by what lies there; the first one that fits
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
    """A source and its items. ``one_of_many``: whether it is such as a shell's ``*`` names, by the thousand."""

    name: str
    items: Iterator[ItemRef]
    one_of_many: bool


def with_images(sources: Sequence[Opened]) -> Iterator[ItemRef]:
    """The items of all sources, in order.

    Raises BadInput for a source that is empty, or of which every item is something else than an image; sources that
    are one of many count as one. Only heads are read, and only up to the first one that is an image, of a format we
    take or not, or that cannot be told: damaged and unreadable ones are rows, which say more.
    """
    groups: dict[str, list[Opened]] = {}
    for source in sources:
        groups.setdefault("" if source.one_of_many else source.name, []).append(source)
    with Handles() as handles:
        for group in groups.values():
            _check(group, handles)
    return chain.from_iterable(source.items for source in sources)


def _check(group: Sequence[Opened], handles: Handles) -> None:
    found: Counter[str] = Counter()
    for source in group:
        seen: list[ItemRef] = []
        for ref in source.items:
            seen.append(ref)
            kind = _no_image(ref, handles)
            if kind is None:
                source.items = chain(seen, source.items)
                return
            found[kind] += 1
        source.items = iter(seen)
    raise BadInput(_refusal(group, found))


def _no_image(ref: ItemRef, handles: Handles) -> str | None:
    """What an item is that is certainly no image."""
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
    except Exception:  # remote storage raises what it likes; it will be a row with this reason
        return None
    return None  # of a dataset, whose column is one of images


def _refusal(group: Sequence[Opened], found: Counter[str]) -> str:
    name = group[0].name + (f" and {len(group) - 1} others" if len(group) > 1 else "")
    if not found:
        return f"{name}: holds no image, it is empty; {_ANY}"
    kinds = [f"{kind} ({count})" if count > 1 else kind for kind, count in found.most_common(_TOLD)]
    more = ", …" if len(found) > _TOLD else ""
    total = found.total()
    text = f"{name}: holds no image: {f'of {total} items ' if total > 1 else ''}{', '.join(kinds)}{more}"
    if "://" not in group[0].name and Artifact.exists(group[0].name):
        return f"{text}; it is an artifact of capipe without images: give the shards that it was made of"
    hint = next((hint for kind, hint in _HINTS.items() if kind in found), _ANY)
    return f"{text}; {hint.format(source=group[0].name)}"
