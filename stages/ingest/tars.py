"""Tars as a source: members joined to items by name, regardless of their order in the tar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from ...manifests.files.compressed import plain
from ...manifests.files.outside import ANYWHERE, Reach, is_url, refusal
from ...manifests.files.tar import Member, scan
from ...manifests.samples import is_image, is_sidecar, same_name, sidecars, split_name
from ...manifests.shards import expand
from ...manifests.status import Status
from ...models.images.formats import HEAD_BYTES, no_image
from ..reading.files import open_binary
from .source_refs import Extent, ItemRef, ProblemRef, TarRef


def refs(pattern: str, image_key: str | None, reach: Reach = ANYWHERE) -> Iterator[ItemRef]:
    """Items of the tars that match ``pattern``. Raises BadInput at once if there are none.

    ``reach``: the permitted targets of tars listed by a folder. A tar given by the user itself is not restricted.
    """
    shards = expand(pattern)
    return chain.from_iterable(_refs(shard.url, pattern, image_key, reach) for shard in shards)


def _refs(url: str, pattern: str, image_key: str | None, reach: Reach) -> Iterator[ItemRef]:
    if url != pattern and (reason := _refusal(url, pattern, reach)) is not None:
        return iter([ProblemRef(url, Status.UNSUPPORTED, reason)])
    return tar_refs(url, image_key)


def _refusal(url: str, pattern: str, reach: Reach) -> str | None:
    if is_url(url) and "::" in url and "::" not in pattern:
        return "its name is a URL of its own"
    return refusal(url, reach)


def tar_refs(url: str, image_key: str | None = None) -> Iterator[ItemRef]:
    """Items of one tar, listed from its headers: no image is read.

    ``image_key``: comma-separated extensions; a key's first match is its only image. Without it, each image is an item.

    Unlike a sequential webdataset reader, this joins sidecars that are not next to their image (``tar`` of a folder),
    and keys may repeat: the rows get keys of their own.
    """
    for entry in _entries(url):
        yield from [entry] if isinstance(entry, ProblemRef) else _group_refs(url, entry, image_key)


def _entries(url: str) -> list[dict[str, Member] | ProblemRef]:
    """Members of each key by extension, and unusable members, in tar order."""
    groups: dict[str, list[dict[str, Member]]] = {}
    order: list[dict[str, Member] | ProblemRef] = []
    try:
        with open_binary(url) as stream:
            for member in scan(stream):
                if member.problem is not None:
                    status = Status.CORRUPT if member.damaged else Status.UNSUPPORTED
                    order.append(ProblemRef(f"{url}/{member.name or f'byte {member.offset}'}", status, member.problem))
                    continue
                key, extension = split_name(member.name.removeprefix("./"))
                of_key = groups.setdefault(same_name(key), [])
                group = next((g for g in reversed(of_key) if extension not in g), None)
                if group is None:
                    group = {}
                    of_key.append(group)
                    order.append(group)
                group[extension] = member
        if not groups and (kind := _other_kind(url)) is not None:
            return [ProblemRef(url, Status.UNSUPPORTED, kind)]
    except OSError as error:
        order.append(ProblemRef(url, Status.READ_ERROR, f"the tar cannot be read: {error.strerror or error}"))
    return order


def _other_kind(url: str) -> str | None:
    """Actual format of a file that is named like a tar but has no members."""
    with plain(open_binary(url)) as stream:
        kind = no_image(stream.read(HEAD_BYTES))
    return None if kind is None or kind == "a tar archive" or kind.startswith("unknown data") else kind


def _image_members(group: Mapping[str, Member], image_key: str | None) -> list[str]:
    """Extensions of a key's images; members without an image extension are tried if there is nothing else."""
    if image_key is not None:
        wanted = (extension.strip().lower().removeprefix(".") for extension in image_key.split(","))
        return [extension for extension in wanted if extension in group][:1]
    others = [extension for extension in group if not is_sidecar(extension)]
    return [extension for extension in others if is_image(extension)] or others


def _group_refs(url: str, group: Mapping[str, Member], image_key: str | None) -> Iterator[ItemRef]:
    images = _image_members(group, image_key)
    if not images:
        first, what = next(iter(group.values())), "image" if image_key is None else f"member {image_key!r}"
        yield ProblemRef(f"{url}/{first.name}", Status.UNSUPPORTED, f"no {what} with this key ({', '.join(group)})")
    beside = {extension: sidecars(extension, group) for extension in images}
    taken = {*images, *(name for pair in beside.values() for name in pair)}
    ignored = tuple(extension for extension in group if extension not in taken)
    for extension in images:
        text, meta = (_extent(group[name]) if name else None for name in beside[extension])
        yield TarRef(url, _extent(group[extension]), text, meta, ignored)


def _extent(member: Member) -> Extent:
    return Extent(member.name, member.offset, member.size)
