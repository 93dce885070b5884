"""What artifacts cost: tokens from manifests, time from commits, prices; and artifacts from before the columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, LATER, TOKENS, check
from capipe.manifests.times import Span, Worker, device_seconds
from capipe.pipeline.inspect.costs import StageCost, parse_prices, stage_cost
from capipe.pipeline.inspect.discover import find
from capipe.pipeline.report.facts import gather


def test_time_of_a_worker_is_counted_once_however_many_shards_are_open() -> None:
    one, two, none = Worker("a", 1, 8), Worker("b", 2, 8), Worker("c", 0, 8)
    spans = [Span(one, 0, 10), Span(one, 5, 20), Span(one, 30, 40), Span(two, 0, 5), Span(none, 1, 2)]
    assert device_seconds(spans) == (20 + 10 + 2 * 5, 8)
    assert device_seconds([]) == (0, 0)


def test_a_million_rows_at_a_price() -> None:
    cost = StageCost("captions", 1000, {"prompt_tokens": (50_000, 500), "output_tokens": (0, 0)}, gpu_seconds=36.0)
    assert (cost.per_row("prompt_tokens"), cost.total("prompt_tokens")) == (100, 100_000)
    assert cost.per_row("output_tokens") is None and cost.total("image_tokens") is None
    assert cost.gpu_hours_per_million() == pytest.approx(10)
    assert cost.price_per_million({"GPU": 2.5}) == pytest.approx(25)
    assert cost.price_per_million({"core": 1.0}) is None
    on_cpu = StageCost("captions", 100, {}, core_seconds=3600.0)
    assert on_cpu.price_per_million({"core": 0.04}) == pytest.approx(400) and on_cpu.gpu_hours_per_million() is None


SUMS = {"rows": 1, "prompt_tokens": [9, 1], "image_tokens": [0, 0], "output_tokens": [5, 1]}


def artifact_with(folder: Path, sums: Any) -> Artifact:
    artifact = Artifact.create(str(folder), "annotate", {"model": "m"}, {"shards": "x"})
    with artifact.begin("00000", ANNOTATE) as made:
        made.write({**dict.fromkeys(ANNOTATE.names), "key": "a", "status": "ok", "captions": []})
        made.commit(rows_in=1, input_info={"digest": "d", "url": "u", "bytes": 3}, stats={TOKENS: sums})
    artifact.close()
    return artifact


@pytest.mark.parametrize(
    "sums",
    [
        *(None, 7, [], {}, {**SUMS, "rows": 2}, {**SUMS, "rows": True}, {**SUMS, "rows": "1"}),
        *({**SUMS, "output_tokens": value} for value in (None, 5, [5], [5, 2], [-5, 1], [5.5, 1], [2**70, 1], "51")),
    ],
)
def test_sums_that_cannot_be_are_one_line_of_a_report_and_of_a_plan(tmp_path: Path, sums: Any) -> None:
    artifact = artifact_with(tmp_path / "captions", sums)
    with pytest.raises(ArtifactMismatch, match="captions: shard 00000: the sums of tokens in its manifest are mal"):
        stage_cost("captions", artifact)
    facts = gather(find(str(tmp_path)))
    assert facts.costs == [] and len(facts.links) == 1 and [*facts.damaged] == ["captions (costs)"]
    assert "\n" not in facts.damaged["captions (costs)"]


def test_sums_as_they_are_written(tmp_path: Path) -> None:
    cost = stage_cost("captions", artifact_with(tmp_path / "captions", SUMS))
    assert cost is not None and (cost.per_row("prompt_tokens"), cost.per_row("image_tokens")) == (9, None)


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
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    files = f"{tmp_path}/*.parquet"
    asked = f"select prompt_tokens from read_parquet('{files}', union_by_name=true)"
    assert duckdb.sql(asked).fetchall() == [(None,), (7,)]
    newer = polars.read_parquet_schema(tmp_path / "00001.parquet")
    scanned = polars.scan_parquet(files, schema=newer, missing_columns="insert")
    assert scanned.select("prompt_tokens").collect().to_series().to_list() == [None, 7]
