"""The samples of a rank as a `datasets.IterableDataset`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import pyarrow as pa

from ...errors import BadInput
from .stream import Plan, samples


@dataclass(frozen=True)
class _Examples:
    """A generator of examples: those of some streams, one after another."""

    plan: Plan
    epoch: int
    streams: int

    def __call__(self, stream: Sequence[int]) -> Iterator[dict[str, Any]]:
        for number in stream:
            for sample in samples(self.plan, self.epoch, number, self.streams):
                yield _example(sample)


def as_datasets(plan: Plan, epoch: int, streams: int) -> datasets.IterableDataset:
    """One shard of `datasets` for every stream. Raises BadInput for no streams."""
    if type(streams) is not int or streams < 1:
        raise BadInput(f"as_datasets(streams={streams!r}): give a whole number from one on")
    examples = _Examples(replace(plan, decode=None), epoch, streams)
    return datasets.IterableDataset.from_generator(
        examples, features=_features(plan), gen_kwargs={"stream": list(range(streams))}
    )


def _features(plan: Plan) -> datasets.Features:
    texts = datasets.Features({name: datasets.Value("string") for name in ("key", "uid", "caption", "caption_name")})
    scores = datasets.Features.from_arrow_schema(pa.schema(list(plan.query.types.items())))
    shown = {"scores": dict(scores)} if scores else {}
    return datasets.Features({**texts, "image": datasets.Image(), **shown, "json": datasets.Value("string")})


def _example(sample: dict[str, Any]) -> dict[str, Any]:
    meta = None if sample["json"] is None else json.dumps(sample["json"], ensure_ascii=False)
    scores = {"scores": sample["scores"]} if sample["scores"] else {}
    others = {name: sample[name] for name in ("key", "uid", "caption", "caption_name")}
    return {**others, "image": {"bytes": sample["image"], "path": None}, **scores, "json": meta}
