"""Samples of a tar: members grouped by key the way webdataset does it, with nothing trusted and nothing dropped.

A sample is a run of neighbouring members whose names agree up to the first dot of the file name. What breaks that
becomes a sample of its own with a problem: damaged members, unsafe names, links, keys that come back later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from .status import Status
from .tar import Digest, Member, scan

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jfif", "ppm")


@dataclass(slots=True)
class Sample:
    """Members by extension. ``problems``: why it cannot be used as a whole, in which case ``status`` is not ok."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    status: Status = Status.OK
    error: str | None = None

    def image(self) -> Member | None:
        """The first member that is named like an image (``jpg``, or ``seg.jpg``)."""
        return next((m for ext, m in self.members.items() if _is_image(ext)), None)


def _is_image(extension: str) -> bool:
    return extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS


def split_name(name: str) -> tuple[str, str]:
    """``folder/a.left.jpg`` to (``folder/a``, ``left.jpg``): webdataset's rule, extension in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def read_samples(
    stream: BinaryIO, *, read_data: bool = True, digest: Digest | None = None, max_samples: int | None = None
) -> Iterator[Sample]:
    """Every sample of a tar, in order, keys unique. ``digest`` is fed the whole file. Never raises on content."""
    seen: set[bytes] = set()
    for count, sample in enumerate(_group(scan(stream, read_data=read_data, digest=digest))):
        if max_samples is not None and count >= max_samples:
            return
        yield _unique(sample, seen)


def _unique(sample: Sample, seen: set[bytes]) -> Sample:
    """Mark a key that came before, and give the sample a key of its own. Remembers 8 bytes a key, not the key."""
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
        name = member.name.removeprefix("./")
        key, extension = split_name(name)
        if current is None or key != current.key or extension in current.members:
            if current is not None:
                yield _checked(current)
            current = Sample(key)
        current.members[extension] = member
    if current is not None:
        yield _checked(current)


def _alone(member: Member) -> Sample | None:
    """A sample of one for a member that cannot be used, or None. Its key is its name where it has a sound one."""
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
    images = [extension for extension in sample.members if _is_image(extension)]
    if not images:
        names = ", ".join(sample.members)
        sample.status, sample.error = Status.UNSUPPORTED, f"no image among the members of this key ({names})"
    elif len(images) > 1:
        text = f"{len(images)} images under one key ({', '.join(images)}): names must differ before their first dot"
        sample.status, sample.error = Status.UNSUPPORTED, text
    return sample
