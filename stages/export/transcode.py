"""Images that a format's readers do not decode: refused, or encoded anew as `capipe export --transcode` says.

An image encoded anew is another file: its ``uid`` is that of the new bytes, ``source_uid`` that of the source's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ...errors import BadInput, DamagedShard
from ...manifests.files.image_types import IMAGE_TYPES
from ...manifests.files.tar import Member
from ...manifests.samples import Sample
from ...manifests.schema import SOURCE_UID, TRANSCODED
from ...manifests.sidecars import decode_meta, encode_meta
from ...models.images.decode import EVERYTHING, ImageLimits, check
from ...models.images.encoding import Encoding
from ...models.images.formats import ImageProblem, sniff
from .source import Pair

_LIMITS = ImageLimits(max_image_pixels=1 << 40, min_side=1, max_aspect=float("inf"), accept=EVERYTHING)
_NAMES = {name: kind.name for kind in IMAGE_TYPES.values() for name in (kind.name, *kind.others)}
_ORIGINAL = ("original_sha256", "original_format")


def unread(extensions: Iterable[str], readable: Iterable[str]) -> list[str]:
    """Formats among extensions of images that are not ``readable``."""
    return sorted({_NAMES[name] for name in extensions if name in _NAMES} - {*readable})


def refuse(kinds: Iterable[str], where: str) -> None:
    """Raises BadInput if there are any ``kinds`` of images that readers do not decode."""
    if names := ", ".join(kinds):
        text = f"{where}: has images that the readers of this export do not decode ({names})"
        raise BadInput(f"{text}; --transcode jpeg encodes these anew")


def refuse_image(image: bytes, readable: Iterable[str], where: str) -> None:
    """:func:`refuse` by an image's content."""
    kind = sniff(image)
    if not isinstance(kind, ImageProblem):
        refuse(unread([kind], readable), where)


@dataclass(frozen=True, slots=True)
class Transcoder:
    """Encodes pairs' images anew, those that are not ``readable``."""

    encoding: Encoding
    readable: tuple[str, ...]

    def __call__(self, pair: Pair, where: str) -> Pair:
        """The pair as it is exported. Raises DamagedShard if its image cannot be decoded any more, RunFailed if not
        here."""
        row = {**dict.fromkeys(_ORIGINAL), **pair.row, SOURCE_UID: pair.row["uid"]}
        kind = sniff(pair.image)
        if isinstance(kind, ImageProblem) or kind in self.readable:
            return replace(pair, row=row)
        info = check(pair.image, _LIMITS, self.encoding)
        if isinstance(info, ImageProblem) or info.transcoded is None:
            reason = info.reason if isinstance(info, ImageProblem) else "it was not encoded anew"
            raise DamagedShard(
                f"{where}: the image of {pair.row['key']!r}: {reason}; `capipe verify` says what is wrong"
            )
        data = info.transcoded.data
        sha256 = hashlib.sha256(data).hexdigest()
        facts = {"uid": sha256[:32], "original_sha256": hashlib.sha256(pair.image).hexdigest(), "original_format": kind}
        listed = {"sha256": sha256, "format": info.format, "phash": info.phash}
        row |= {**facts, **{name: value for name, value in listed.items() if name in row}}
        sample = _with_image(pair, data, info.format, {**facts, SOURCE_UID: pair.row["uid"]})
        return replace(pair, row=row, sample=sample, image=data, extension=info.format)


def _with_image(pair: Pair, data: bytes, extension: str, facts: Mapping[str, Any]) -> Sample:
    """The pair's sample with another image, and JSON that tells of it."""
    members: dict[str, bytes] = {}
    for name, member in pair.sample.members.items():
        if name == pair.extension:
            members[extension] = data
        elif name == "json":
            members[name] = encode_meta({**(decode_meta(member.data, []) or {}), **facts}, {})
        else:
            members[name] = member.data or b""
    key = pair.sample.key
    named = {name: Member(f"{key}.{name}", 0, len(body), data=body) for name, body in members.items()}
    return Sample(key, named)


def schema_of(listing: pa.Schema) -> pa.Schema:
    """Schema of a listing with the columns about images encoded anew."""
    further = [TRANSCODED.field(name) for name in _ORIGINAL] + [pa.field(SOURCE_UID, pa.string())]
    return pa.schema([*listing, *(field for field in further if field.name not in listing.names)])


def relisted(batch: pa.RecordBatch, first: int, changes: Mapping[int, Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows of a listing as exported. ``first``: number of the first; ``changes``: rows of pairs, by number."""
    rows = batch.to_pylist()
    for number, row in enumerate(rows, first):
        row[SOURCE_UID] = row["uid"]
        row |= changes.get(number, {})
    return pa.RecordBatch.from_pylist(rows, schema=schema_of(batch.schema))
