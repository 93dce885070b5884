"""What a file may unpack to, known before it is unpacked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests import manifest
from capipe.manifests.artifact import Artifact
from capipe.manifests.files import storage
from capipe.manifests.files.storage import expecting
from capipe.manifests.fingerprint import canonical
from capipe.manifests.schema import INGEST
from capipe.manifests.shards import RowReader, expand, join
from capipe.manifests.verify import verify

ROWS = 30_000_000


def make(out: Path, rows: int = 12) -> Artifact:
    artifact = Artifact.create(str(out), "test", {"model": "m"}, {})
    with artifact.begin("00000", INGEST, tar=True) as transaction:
        for number in range(rows):
            uid = hashlib.sha256(b"%d" % number).hexdigest()[:32]
            row = {"key": str(number), "uid": uid, "status": "ok", "error": None}
            transaction.write(row, {"jpg": b"%d" % number})
        transaction.commit(rows_in=rows, input_info={"digest": "x"})
    artifact.close()
    return artifact


def swell(out: Path, rows: int) -> None:
    """Put equal rows in the place of a shard's, with a manifest whose sizes and checksums fit, but not its counts."""
    row = {"key": "k", "uid": "0" * 32, "status": "ok"}
    with pq.ParquetFile(out / "00000.parquet") as file:
        schema = pa.schema([each for each in file.schema_arrow if each.name in row])
    table = pa.table({name: pa.array([value] * 1_000_000) for name, value in row.items()}, schema=schema)
    with pq.ParquetWriter(out / "00000.parquet", schema, compression="zstd") as writer:
        for start in range(0, rows, 1_000_000):
            writer.write_table(table.slice(0, min(1_000_000, rows - start)), row_group_size=1_000_000)
    data = (out / "00000.parquet").read_bytes()
    path = out / "_capipe/manifest.jsonl"
    entry = json.loads(path.read_bytes())
    del entry[manifest.CHECKSUM]
    entry["files"]["00000.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(canonical({**entry, manifest.CHECKSUM: manifest._checksum(entry)}) + "\n")


def test_a_small_file_of_a_great_many_rows_is_one_finding_and_costs_nothing(tmp_path: Path) -> None:
    make(tmp_path / "out")
    swell(tmp_path / "out", ROWS)
    assert (tmp_path / "out/00000.parquet").stat().st_size < 4 << 20
    code = (
        "import re; from pathlib import Path; from capipe.manifests.verify import verify\n"
        f"faults = verify({str(tmp_path / 'out')!r}).faults\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(int(peak) >> 10, *faults, sep='\\n')"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(told[0]) < 300 and len(told) == 2
    assert f"00000.parquet: {ROWS} rows, 12 in the manifest" in told[1]


def test_whoever_reads_a_shard_sees_first_that_it_has_other_rows(tmp_path: Path) -> None:
    images, notes = make(tmp_path / "images"), make(tmp_path / "notes")
    (whole,) = join(expand(images.url), {"notes": notes})
    swell(tmp_path / "notes", 13)
    (changed,) = join(expand(images.url), {"notes": notes})
    for read in (
        lambda: notes.read_rows("00000"),
        lambda: notes.parquet("00000"),
        lambda: notes.table("00000", ["key"]),
        lambda: changed.companions[0].open(),
        lambda: list(RowReader(changed)),
        lambda: list(RowReader(expand(notes.url)[0])),
    ):
        with pytest.raises(ArtifactMismatch, match="13 rows, 12 in the manifest"):
            read()
    assert whole.companions[0].rows == 12


def test_rows_of_a_shard_that_was_committed_anew_are_those_of_its_new_line(tmp_path: Path) -> None:
    reader = make(tmp_path / "out")
    assert reader.table("00000").num_rows == 12
    writer = Artifact.create(reader.url, "test", {"model": "m"}, {})
    with writer.begin("00000", INGEST, tar=True, over=writer.committed()["00000"]) as transaction:
        transaction.write({"key": "a", "uid": "a" * 32, "status": "corrupt", "error": None})
        transaction.commit(rows_in=1, input_info={"digest": "x"})
    writer.close()
    assert reader.table("00000").num_rows == 1


def test_a_row_group_that_unpacks_to_too_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 100_000] * 10, "list": [[0] * 1000] * 10}), path)
    expecting(pq.ParquetFile(path), 10, "a").close()
    for limit, value in (("MAX_GROUP_BYTES", 100_000), ("MAX_GROUP_VALUES", 9_999)):
        with monkeypatch.context() as patch:
            patch.setattr(storage, limit, value)
            with pytest.raises(ArtifactMismatch, match="a: a row group of"):
                expecting(pq.ParquetFile(path), 10, "a")


def test_a_file_of_another_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out")
    with (tmp_path / "out/00000.tar").open("r+b") as file:
        file.truncate(1 << 40)  # a hole
    (fault,) = verify(str(tmp_path / "out")).faults
    assert f"00000.tar: {1 << 40} bytes, " in fault
