"""Properties of all artifacts of one stage: their columns, and how other tools show and join them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

RowPart = Literal["text", "captions", "questions", "screened questions", "answers", "scores"]


@dataclass(frozen=True)
class ArtifactSpec:
    """``stage``: its name in ``config.json``. ``label``: a description of its rows, for reports.

    ``schema``: columns of every shard; None if they vary. ``own_rows``: its shards have rows of their own, not one for
    each row of another artifact's shard. ``source_key``: the column with a row's key in the input, for stages that
    change keys. ``copies``: shards of the input under the same keys, resharded or not. ``shown``: the part of a row
    shown in the report's gallery. ``histograms``: the report plots its scores. ``repeated``: a pattern of columns that
    repeat the input's; the viewer omits them.
    """

    stage: str
    label: str
    schema: pa.Schema | None = None
    own_rows: bool = False
    source_key: str | None = None
    copies: bool = False
    shown: RowPart | None = None
    histograms: bool = False
    repeated: str = ""
