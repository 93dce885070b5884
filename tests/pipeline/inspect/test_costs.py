"""What artifacts cost: tokens from manifests, time from commits, prices; and artifacts from before the columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.schema import ANNOTATE, LATER, check
from capipe.manifests.times import Span, device_seconds
from capipe.pipeline.inspect.costs import StageCost, parse_prices


def test_time_of_a_worker_is_counted_once_however_many_shards_are_open() -> None:
    spans = [Span("a", 1, 0, 10), Span("a", 1, 5, 20), Span("a", 1, 30, 40), Span("b", 2, 0, 5), Span("c", 0, 1, 2)]
    assert device_seconds(spans) == (20 + 10 + 2 * 5, 1)
    assert device_seconds([]) == (0, 0)


def test_a_million_rows_at_a_price() -> None:
    cost = StageCost("captions", 1000, {"prompt_tokens": (50_000, 500), "output_tokens": (0, 0)}, gpu_seconds=36.0)
    assert (cost.per_row("prompt_tokens"), cost.total("prompt_tokens")) == (100, 100_000)
    assert cost.per_row("output_tokens") is None and cost.total("image_tokens") is None
    assert cost.gpu_hours_per_million() == pytest.approx(10)
    assert cost.price_per_million({"GPU": 2.5}) == pytest.approx(25)
    assert cost.price_per_million({"core": 1.0}) is None
    on_cpu = StageCost("captions", 100, {}, cpu_seconds=3600.0)
    assert on_cpu.price_per_million({"core": 0.04}) == pytest.approx(400) and on_cpu.gpu_hours_per_million() is None


def test_prices() -> None:
    assert parse_prices(["GPU=2.50", "core=0.04"]) == {"GPU": 2.5, "core": 0.04}
    for text in ("2.50", "GPU=", "GPU=-1", "GPU=nan", "TPU=1", "GPU=1e12"):
        with pytest.raises(BadInput, match=r"^--price .*: give an hour's price as GPU=AMOUNT or core=AMOUNT$"):
            parse_prices([text])
    with pytest.raises(BadInput, match="GPU has a price already"):
        parse_prices(["GPU=1", "GPU=2"])


def test_columns_that_older_artifacts_lack_may_be_missing_and_no_others(tmp_path: Path) -> None:
    older = pa.schema([field for field in ANNOTATE if field.name not in LATER])
    check(older, ANNOTATE, "older")
    with pytest.raises(ArtifactMismatch, match="column 'captions' is missing"):
        check(older.remove(older.get_field_index("captions")), ANNOTATE, "x")
    with pytest.raises(ArtifactMismatch, match="column 'prompt_tokens' is string"):
        check(older.append(pa.field("prompt_tokens", pa.string())), ANNOTATE, "x")


def test_an_artifact_whose_older_shards_lack_them_is_read_as_one(tmp_path: Path) -> None:
    """As any reader of many files does: missing columns are null."""
    from capipe.manifests.files.storage import Folder, read_parquet

    row: dict[str, Any] = {**dict.fromkeys(ANNOTATE.names), "key": "a", "status": "ok"}
    older = pa.schema([field for field in ANNOTATE if field.name not in LATER])
    pq.write_table(pa.Table.from_pylist([row], schema=older), tmp_path / "00000.parquet")
    pq.write_table(pa.Table.from_pylist([{**row, "prompt_tokens": 7}], schema=ANNOTATE), tmp_path / "00001.parquet")
    tables = [read_parquet(Folder(str(tmp_path)), f"0000{number}.parquet") for number in range(2)]
    joined = pa.concat_tables(tables, promote_options="default")
    assert joined["prompt_tokens"].to_pylist() == [None, 7]
