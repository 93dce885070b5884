"""Shards are read by the tools that pretraining teams use, and hold the very bytes that went in."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, INGEST
from capipe.manifests.shards import Row, RowReader
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.runners.shard_queue import JobResult

from ...conftest import photo
from ..conftest import CaptionServer, capipe, table


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 photos through ingest and annotate --pack: the captions, with ``shards`` beside them."""
    tmp_path = tmp_path_factory.mktemp("packed")
    server = CaptionServer()
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.jpg").write_bytes(photo(i))
        (folder / f"{i:02}.txt").write_text(f"photo {i}")
    (folder / "07.jpg").write_bytes(photo(7)[:300])
    capipe("ingest", folder, "--out", tmp_path / "shards", "--shard-size", 8)
    out = tmp_path / "captions"
    options = ("--model", "m", "--engine", server.url, "--prompt", "dense", "--pack")
    capipe("annotate", "--shards", tmp_path / "shards", "--out", out, *options)
    server.close()
    return out


def originals() -> list[bytes]:
    return [photo(i) for i in range(20) if i != 7]


def test_webdataset(packed: Path) -> None:
    for folder in (packed.parent / "shards", packed):
        urls = str(folder / "{00000..00002}.tar")
        samples = list(wds.WebDataset(urls, shardshuffle=False))
        assert [sample["jpg"] for sample in samples] == originals()
        decoded = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json"))
        assert all(isinstance(image, Image.Image) and text and meta["uid"] for image, text, meta in decoded)


def test_hugging_face(packed: Path, tmp_path: Path) -> None:
    for folder in (packed.parent / "shards", packed):
        tars = sorted(map(str, folder.glob("*.tar")))
        loaded = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path / "cache"))
        raw = loaded.cast_column("jpg", datasets.Image(decode=False))
        assert [row["jpg"]["bytes"] for row in raw] == originals()
        assert loaded[0]["jpg"].size == (96, 64)


def test_pyarrow_reads_every_row_with_the_declared_columns(packed: Path) -> None:
    for folder, schema in ((packed.parent / "shards", INGEST), (packed, ANNOTATE)):
        whole = pq.ParquetDataset(sorted(map(str, folder.glob("*.parquet")))).read()
        assert whole.schema.remove_metadata() == schema and whole.num_rows == 20
    rows = table(packed)
    assert rows[7]["status"] == "corrupt" and rows[7]["error"]
    assert [row["uid"] for row in rows if row["status"] == "ok"] == [
        hashlib.sha256(data).hexdigest()[:32] for data in originals()
    ]
    assert all("caption of" in row["captions"][0]["text"] for row in rows if row["status"] == "ok")


def test_annotate_from_and_to_an_object_store(s3: str, tmp_path: Path, server: CaptionServer, cache: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(photo(i))
    root = f"{s3}/{tmp_path.name}"
    capipe("ingest", folder, "--out", f"{root}/shards", "--shard-size", 3)
    options = ("--model", "m", "--engine", server.url)
    for _ in range(2):
        capipe("annotate", "--shards", f"{root}/shards", "--out", f"{root}/captions", *options)
    assert server.requests == 6
    assert verify(f"{root}/captions").faults == [] and len(Artifact.open(f"{root}/captions").committed()) == 2
    assert not any(path.is_file() and path.name != "lock" for path in cache.rglob("*"))


def into_memory(packed: Path, server: CaptionServer, out: str) -> JobResult:
    """Annotate the shards inside this process, packed."""
    from capipe.models.engines.loading import EngineConfig
    from capipe.pipeline.jobs.annotate import AnnotateStage
    from capipe.pipeline.jobs.rows.engine import EngineSetup, execute, plan
    from capipe.pipeline.runners.placement import Placement
    from capipe.stages.annotate.captioner import AnnotateConfig
    from capipe.stages.annotate.prompts import parse_prompt

    config = AnnotateConfig(prompts=(parse_prompt("short"),))
    setup = EngineSetup(EngineConfig(server.url, "m"), decode_workers=1)
    made = plan(AnnotateStage(config, setup, "m", pack=True), str(packed.parent / "shards"), out)
    try:
        return execute(made, lambda event: None, Placement())
    finally:
        made.artifact.close()


def test_annotate_into_memory(packed: Path, server: CaptionServer) -> None:
    assert into_memory(packed, server, "memory://captions-in-memory").quarantined == {}
    with fsspec.open("memory://captions-in-memory/00000.parquet", "rb") as file:
        assert pq.read_table(io.BytesIO(file.read())).num_rows == 8
    assert verify("memory://captions-in-memory").faults == []


def test_a_shard_that_cannot_be_written_does_not_hold_up_the_others(
    packed: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capipe.pipeline.jobs.annotate import AnnotateProcessor

    real = AnnotateProcessor.members

    def failing(self: AnnotateProcessor, source: Row, row: dict[str, object]) -> dict[str, bytes] | None:
        if source.key.startswith("00001"):
            raise ValueError("cosmic rays")
        return real(self, source, row)

    monkeypatch.setattr(AnnotateProcessor, "members", failing)
    outcome = into_memory(packed, server, "memory://captions-of-most")
    assert outcome.quarantined == {"00001": "ValueError: cosmic rays"}
    assert sorted(Artifact.open("memory://captions-of-most").committed()) == ["00000", "00002"]
    assert server.requests == len(originals())  # its rows were kept in the journal for the second and third try


@pytest.mark.parametrize(
    ("trouble", "reason"), [(OSError(5, "Input/output error"), "Input/output error"), (None, "changed while")]
)
def test_a_source_that_fails_at_the_commit_is_its_own_shards_fault(
    packed: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch, trouble: OSError | None, reason: str
) -> None:
    """The images are read a second time for a packed tar: by then the disk may be broken, or the shard another one."""
    opened: Counter[str] = Counter()

    class Reader(RowReader):
        def __iter__(self) -> Iterator[Row]:
            opened[self.shard.name] += 1
            again = opened[self.shard.name] % 2 == 0 and self.shard.name == "00001"
            for row in super().__iter__():
                if again and trouble is not None:
                    raise trouble
                yield replace(row, uid="another") if again else row

    monkeypatch.setattr("capipe.manifests.withdrawal.rows.RowReader", Reader)
    out = f"memory://captions-{reason[:5]}"
    outcome = into_memory(packed, server, out)
    assert list(outcome.quarantined) == ["00001"] and reason in outcome.quarantined["00001"]
    assert sorted(Artifact.open(out).committed()) == ["00000", "00002"]
