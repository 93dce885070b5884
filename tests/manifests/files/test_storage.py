"""Artifacts on filesystems that are no local disk: in memory, and on an S3 server on loopback."""

from __future__ import annotations

import ast
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.files import storage
from capipe.manifests.files.storage import Folder, open_parquet
from capipe.manifests.schema import INGEST
from capipe.manifests.shards import RowReader, expand, uid_of
from capipe.manifests.verify import verify

from ...conftest import photo


@pytest.fixture(params=["memory", "s3", "file"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/data"


def test_write_read_resume_verify(root: str) -> None:
    url = f"{root}/shards"
    for round_number in range(2):
        artifact = Artifact.create(url, "ingest", {"a": 1}, {"shards_total": 2})
        name = f"0000{round_number}"
        assert len(artifact.committed()) == round_number
        with artifact.begin(name, INGEST, tar=True) as shard:
            image = photo(round_number)
            shard.write({"key": name, "uid": uid_of(image), "status": "ok", "error": None}, {"jpg": image})
            shard.commit(rows_in=1, input_info={"digest": "d"})
        artifact.close()
    report = verify(url)
    assert (report.faults, report.shards) == ([], 2)
    rows = [row for shard in expand(url) for row in RowReader(shard)]
    assert [row.image for row in rows] == [photo(0), photo(1)]
    assert sorted(n for n in Folder(url).names() if n != "_capipe") == sorted(
        f"0000{i}{end}" for i in range(2) for end in (".tar", ".parquet", "_stats.json")
    )
    for pattern in (f"{url}/*.tar", f"{url}/{{00000..00001}}.tar"):
        assert [(shard.name, shard.record) for shard in expand(pattern)] == list(artifact.committed().items())


def test_a_journal_of_a_remote_artifact_is_kept_locally(root: str) -> None:
    artifact = Artifact.create(f"{root}/journaled", "test", {}, {})
    journal = artifact.journal("00000")
    journal.append(0, {"key": "k"})
    journal.close()
    artifact.close()
    assert Artifact.create(f"{root}/journaled", "test", {}, {}).journal("00000").rows == {0: {"key": "k"}}


def test_an_unknown_protocol_is_one_line() -> None:
    with pytest.raises(BadInput, match="nosuch://"):
        Folder("nosuch://bucket/x")


def test_parquet_is_opened_in_one_place_and_never_by_a_python_file() -> None:
    """Threads of Arrow that call back into Python abort a process that ends before them."""
    package = Path(storage.__file__).parents[2]
    readers = {"ParquetFile", "ParquetDataset", "read_table", "read_schema", "read_metadata", "read_pandas"}
    found = set()
    for folder in ("manifests", "models", "stages", "trainer", "pipeline"):
        for path in sorted((package / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in readers:
                    found.add((path.name, ast.unparse(node)))
    opened = {("storage.py", "pq.ParquetFile(path)"), ("storage.py", "pq.ParquetFile(pa.BufferReader(data))")}
    safetensors = {("state.py", "HuggingFaceStorageReader(str(folder)).read_metadata()")}
    assert found == opened | safetensors


@pytest.mark.parametrize("name", ["a.parquet", "a::b.parquet", "lat\udce9n.parquet"])
def test_local_parquet_of_any_name_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        pq.write_table(pa.table({"key": ["x"]}), file)
    with open_parquet(str(path)) as parquet:
        assert parquet.read(use_threads=False).to_pylist() == [{"key": "x"}]
