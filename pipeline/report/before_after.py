"""Captions of the same images by the captioner before and after training, with a reader's answers from each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..inspect.discover import HERE
from ..inspect.images import RowImages
from ..inspect.sampled import sampled
from ..inspect.shard_join import ShardJoin, ShardName
from .evaluations import Gain
from .examples import head
from .render import cut, data_uri

PAIRS = 4  # images


@dataclass(frozen=True)
class GradedText:
    """A caption with quiz counts: ``right`` of ``scored`` presentations of its image's questions answered right."""

    text: str
    right: int
    scored: int


@dataclass(frozen=True)
class CaptionPair:
    """One image with both captions. ``image``: data URI; None if the image cannot be read."""

    key: str
    image: str | None
    before: GradedText
    after: GradedText


def caption_pairs(join: ShardJoin, gain: Gain, images: RowImages, count: int = PAIRS) -> list[CaptionPair]:
    """Pairs from the first shard that both evaluations graded, evenly spaced over its first rows, not hand-picked."""
    for shard in join.records.get(_graded(gain.before.name), ()):
        before = ShardName(_graded(gain.before.name), shard)
        after = next((other for other in join.beside(before) if other.artifact == _graded(gain.after.name)), None)
        if after is not None:
            return _pairs(join, gain.system, before, after, images, count)
    return []


def _graded(evaluation: str) -> str:
    """Artifact in an evaluation's folder with its captions and answers."""
    return "graded" if evaluation == HERE else f"{evaluation}/graded"


def _pairs(
    join: ShardJoin, system: str, before: ShardName, after: ShardName, images: RowImages, count: int
) -> list[CaptionPair]:
    tables = head(join, before), head(join, after)
    if tables[0] is None or tables[1] is None:
        return []
    graded: list[tuple[dict[str, Any], GradedText, GradedText]] = []
    for old, new in zip(tables[0].to_pylist(), tables[1].to_pylist(), strict=False):
        old_text, new_text = _first(old, system), _first(new, system)
        if old["uid"] == new["uid"] and old_text is not None and new_text is not None:
            graded.append((old, old_text, new_text))
    return [
        CaptionPair(str(row["key"]), data_uri(images.of(join, before, row)), old_text, new_text)
        for row, old_text, new_text in sampled(graded, count)
    ]


def _first(row: Mapping[str, Any], system: str) -> GradedText | None:
    """First caption of a system; None without one."""
    for caption in row["captions"] or []:
        if caption["name"].partition("#")[0] == system and caption["text"]:
            answers = caption["answers"] or []
            right, scored = (sum(answer[name] or 0 for answer in answers) for name in ("right", "scored"))
            return GradedText(cut(caption["text"]), right, scored)
    return None
