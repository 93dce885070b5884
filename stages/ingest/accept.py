"""Formats that `capipe ingest --accept` takes besides JPEG, PNG and WebP."""

from __future__ import annotations

from ...errors import BadInput
from ...manifests.files.image_types import COMMON, FURTHER, IMAGE_TYPES
from ...models.images.decode import ANIMATED, ImageInfo
from ...models.images.formats import ImageProblem, read_header, sniff
from ...models.images.openers import check_decoders, decodable, missing

ACCEPTED = (*FURTHER, ANIMATED)
ALL = "all"  # everything that is decoded here
_NAMES = {name: kind.name for kind in IMAGE_TYPES.values() for name in (kind.name, *kind.others)}


def accepted(names: str | None) -> tuple[str, ...]:
    """The value of the option: names of formats or their extensions, separated by commas.

    Raises BadInput for other names, and for a format whose decoder is not installed.
    """
    if names is None:
        return ()
    chosen: set[str] = set()
    for name in (part.strip().lower() for part in names.split(",")):
        if name == ALL:
            chosen |= decodable() | {ANIMATED}
        elif name in _NAMES or name == ANIMATED:
            chosen.add(_NAMES.get(name, name))
        else:
            raise BadInput(f"--accept {name}: unknown; one of {', '.join(ACCEPTED)}, or {ALL}")
    check_decoders(sorted(chosen))
    return tuple(name for name in ACCEPTED if name in chosen)


def advice(data: bytes, verdict: ImageInfo | ImageProblem) -> list[str]:
    """What to say of an image besides its verdict: which option takes it, or that only its first frame is seen."""
    if isinstance(verdict, ImageInfo):
        return [f"the first of {verdict.frames} frames"] if verdict.frames > 1 else []
    kind = sniff(data)
    if isinstance(kind, ImageProblem):
        return []
    if kind not in COMMON and verdict.reason.endswith(IMAGE_TYPES[kind].words):
        needs = missing(kind)
        return [f"--accept {kind} takes it" if needs is None else f"--accept {needs}"]
    header = read_header(data)
    animated = not isinstance(header, ImageProblem) and header.frames > 1 and verdict.reason.startswith("animated")
    return [f"--accept {ANIMATED} takes the first"] if animated else []
