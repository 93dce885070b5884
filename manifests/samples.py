"""Samples of a tar: members grouped by key as in webdataset, with nothing trusted and nothing dropped.

A sample is a run of adjacent members whose names agree up to the first dot of the file name. Exceptions become samples
of their own with a problem: damaged members, unsafe names, links, keys that recur later.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from .files.compressed import Digest
from .files.image_types import IMAGE_EXTENSIONS
from .files.tar import Member, Wanted, scan, without_controls
from .status import Status

TEXT_EXTENSIONS = ("txt", "caption")  # of caption files beside an image, the more likely first
META_EXTENSIONS = ("json",)
SIDECAR_EXTENSIONS = (*TEXT_EXTENSIONS, *META_EXTENSIONS)
_TEXT_MEMBERS = (*TEXT_EXTENSIONS, "caption.txt")  # a.image.jpg with a.caption.txt, as some writers name them
_META_MEMBERS = (*META_EXTENSIONS, "meta.json")


@dataclass(slots=True)
class Sample:
    """Members by extension. ``error``: why the sample cannot be used; ``status`` is then not ok."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    status: Status = Status.OK
    error: str | None = None

    def image(self) -> Member | None:
        """The first member with the name of an image (``jpg``, or ``seg.jpg``)."""
        return next((m for ext, m in self.members.items() if is_image(ext)), None)


class Sidecars(NamedTuple):
    """The extensions of an image's caption and metadata among the members of its key."""

    text: str | None
    meta: str | None


def sidecars(image: str, extensions: Collection[str]) -> Sidecars:
    """The members of a key that belong to its member ``image``: those named like it (``left.txt`` for ``left.jpg``),
    else those of the whole key. Used for all tars, whether they are ingested or read in place."""
    prefix = image.rpartition(".")[0]

    def first(own: tuple[str, ...], shared: tuple[str, ...]) -> str | None:
        names = [*(f"{prefix}.{extension}" for extension in own if prefix), *shared]
        return next((name for name in names if name in extensions), None)

    return Sidecars(first(TEXT_EXTENSIONS, _TEXT_MEMBERS), first(META_EXTENSIONS, _META_MEMBERS))


def is_image(extension: str) -> bool:
    """True if a member is named like an image: ``jpg``, or ``seg.jpg``."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def is_sidecar(extension: str) -> bool:
    """True if a member is named like a caption or metadata: ``txt``, or ``ocr.txt``."""
    return extension.rpartition(".")[2] in SIDECAR_EXTENSIONS


def same_name(name: str) -> str:
    """NFC form of a name: macOS writes ``é`` as two characters, most writers as one."""
    return unicodedata.normalize("NFC", name)


def split_name(name: str) -> tuple[str, str]:
    """Split ``folder/a.left.jpg`` into (``folder/a``, ``left.jpg``): webdataset's rule, extension in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_samples(
    stream: BinaryIO, *, read_data: Wanted = True, digest: Digest | None = None, max_samples: int | None = None
) -> Iterator[Sample]:
    """Every sample of a tar, in order, with unique keys; ``read_data`` and ``digest`` as :func:`.files.tar.scan`.

    Never raises on content.
    """
    seen: set[bytes] = set()
    for count, sample in enumerate(_group(scan(stream, read_data=read_data, digest=digest))):
        if max_samples is not None and count >= max_samples:
            return
        yield _unique(sample, seen)


def _unique(sample: Sample, seen: set[bytes]) -> Sample:
    """Mark a repeated key, and give the sample a new one. Stores 8 bytes per key, not the key."""
    original, number = sample.key, 1
    while (mark := hashlib.blake2b(sample.key.encode("utf-8", "replace"), digest_size=8).digest()) in seen:
        number += 1
        sample.key = f"{original}~{number}"
    seen.add(mark)
    if number > 1:
        sample.status = Status.DUPLICATE if sample.status is Status.OK else sample.status
        sample.error = sample.error or f"key {original!r} came before in this tar; members of a sample must be adjacent"
    return sample


def _group(members: Iterator[Member]) -> Iterator[Sample]:
    current: Sample | None = None
    for member in members:
        problem = _alone(member)
        if problem is not None:
            if current is not None:
                yield _checked(current)
            current = None
            yield problem
            continue
        key, extension = split_name(without_controls(member.name.removeprefix("./")))
        if current is None or same_name(key) != same_name(current.key) or extension in current.members:
            if current is not None:
                yield _checked(current)
            current = Sample(key)
        current.members[extension] = member
    if current is not None:
        yield _checked(current)


def _alone(member: Member) -> Sample | None:
    """A sample of its own for an unusable member, or None. Its key is the member's name if that is valid."""
    if member.problem is not None:
        key = split_name(member.name)[0] if member.name and member.damaged else ""
        status = Status.CORRUPT if member.damaged else Status.UNSUPPORTED
        return Sample(key or f"member@{member.offset}", {}, status, member.problem)
    key, extension = split_name(member.name.removeprefix("./"))
    if not extension or key.endswith("/") or not key:
        reason = f"member {member.name!r} is not named <key>.<extension>"
        return Sample(f"member@{member.offset}", {}, Status.UNSUPPORTED, reason)
    return None


def _checked(sample: Sample) -> Sample:
    images = [extension for extension in sample.members if is_image(extension)]
    if not images:
        names = ", ".join(sample.members)
        sample.status, sample.error = Status.UNSUPPORTED, f"no image among the members of this key ({names})"
    elif len(images) > 1:
        text = f"{len(images)} images under one key ({', '.join(images)}): names must differ before their first dot"
        text += f"; `capipe ingest --image-key {images[0]}` takes one of them"
        sample.status, sample.error = Status.UNSUPPORTED, text
    return sample
