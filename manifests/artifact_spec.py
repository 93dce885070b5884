"""What is known of all artifacts of one stage: their columns, and how other tools show and join them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

RowPart = Literal["text", "captions", "questions", "screened questions", "answers", "scores"]


@dataclass(frozen=True)
class ArtifactSpec:
    """``stage``: its name in ``config.json``. ``label``: what its rows are, in a report.

    ``schema``: columns that every shard has; None where they vary. ``own_rows``: its rows are no other shard's, one by
    one. ``source_key``: the column with a row's key in the input, for stages that change keys. ``copies``: shards of
    the input under the same keys, recut or not. ``shown``: what the report's gallery takes from a row. ``histograms``:
    the report draws its scores. ``repeated``: a pattern of columns that say nothing new beside the input's; the viewer
    leaves them out.
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
