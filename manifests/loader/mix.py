"""Captions of an image: where those of a name are, and the choice between them by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadInput
from ..expressions.conditions import Mask
from ..status import Status


@dataclass(frozen=True)
class CaptionSource:
    """Captions of one name: a ``column`` of a sidecar. ``prompt``: if the column lists captions, the name of the one
    that is meant, "" for the first that is ok; None if it has one text a row."""

    sidecar: str
    column: str
    prompt: str | None = None


def checked_mix(mix: Mapping[str, float], known: Collection[str]) -> dict[str, float]:
    """The weights by name, in order of names. Raises BadInput for unknown names and for what is no weight."""
    if not mix:
        raise BadInput("mix={}: no captions in it; leave it out, or name some with their weights")
    for name, weight in mix.items():
        if name not in known:
            raise BadInput(f"mix: there are no captions {name!r}; known: {', '.join(sorted(known)) or 'none'}")
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not number or weight <= 0:
            raise BadInput(f"mix: {name!r} has the weight {weight!r}; give a number above zero, or leave the name out")
    return {name: float(mix[name]) for name in sorted(mix)}


def pick(mix: Mapping[str, float], there: Collection[str], seed: int, epoch: int, uid: str) -> str:
    """One of the names of ``mix`` that are ``there``, at least one, by their weights: a function of its arguments."""
    names = [name for name in mix if name in there]
    if len(names) == 1:
        return names[0]
    digest = hashlib.blake2b(f"{seed} {epoch} {uid}".encode(), digest_size=8).digest()
    left = int.from_bytes(digest, "big") / 2**64 * sum(mix[name] for name in names)
    for name in names:
        left -= mix[name]
        if left < 0:
            return name
    return names[-1]


def texts(source: CaptionSource, column: pa.ChunkedArray) -> pa.Array:
    """The caption of every row, null if there is none: no text, a blank one, or one that is not ok."""
    values = column.combine_chunks()
    if source.prompt is None:
        return pc.if_else(_is_text(values), values, pa.scalar(None, values.type))
    flat = values.flatten()
    wanted = pc.and_(pc.equal(pc.struct_field(flat, "status"), str(Status.OK)), _is_text(pc.struct_field(flat, "text")))
    if source.prompt:
        wanted = pc.and_(wanted, pc.equal(pc.struct_field(flat, "name"), source.prompt))
    places = np.flatnonzero(pc.fill_null(wanted, False).to_numpy(zero_copy_only=False))
    rows, firsts = np.unique(pc.list_parent_indices(values).to_numpy()[places], return_index=True)
    chosen = np.full(len(values), -1, np.int64)
    chosen[rows] = places[firsts]
    return pc.struct_field(flat, "text").take(pa.array(chosen, mask=chosen < 0))


def present(columns: Sequence[pa.Array]) -> Mask:
    """Mask of the rows with a caption in at least one of ``columns``."""
    found: Mask = np.zeros(len(columns[0]), dtype=bool)
    for column in columns:
        found |= column.is_valid().to_numpy(zero_copy_only=False)
    return found


def _is_text(values: pa.Array) -> pa.Array:
    return pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), False)
