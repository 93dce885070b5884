"""A shard as a fragment of a Lance table: one data file with images, captions, scores and metadata of its ok rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ....manifests.file_transaction import FileTransaction
from ....models.images.decode import upright_header
from ....models.images.formats import ImageProblem
from ..parquet import GROUP_BYTES, GROUP_ROWS, metadata_of
from ..source import Pair
from ..writer import ShardWriter
from .schema import DATA, STORAGE, TABLE, check_installed, columns_digest, data_file, fragment_file, table_schema


class LanceWriter(ShardWriter):
    """The shard's ok rows, in order. A shard without any gets no fragment. ``rows``: the listing's schema."""

    extras = (TABLE,)
    data_files = f"{TABLE}/**"
    loading = f"""\
```python
import lance, datasets

table = lance.dataset("path/of/this/folder/{TABLE}")
table.to_table(columns=["key", "caption"], filter="width >= 512")  # reads these columns alone
table.take([7, 5], columns=["image"])["image"][0].as_py()  # the bytes of one image
datasets.load_dataset("path/of/this/folder", split="train")  # or its name on the Hub
```

For torch, `lance.torch.data.LanceDataset(table, batch_size, columns=…, to_tensor_fn=…)`; fragments are the shards."""

    def __init__(self, out: FileTransaction, shard: str, rows: pa.Schema) -> None:
        super().__init__(out, shard)
        self._schema, self._listed = table_schema(rows), frozenset(rows.names)
        self._names = [name for name in self._schema.names if name in self._listed]
        self._writer: Any = None
        self._group: list[dict[str, Any]] = []
        self._samples = self._size = 0

    @classmethod
    def check(cls) -> None:
        check_installed()

    @classmethod
    def for_shard(cls, out: FileTransaction, shard: str, rows: pa.Schema, extension: str | None) -> LanceWriter:
        return cls(out, shard, rows)

    def add(self, pair: Pair) -> None:
        row = {name: pair.row[name] for name in self._names}
        measured = {"image": pair.image, "caption": pair.caption, **_header(pair)}
        self._group.append({**metadata_of(pair), **row, **measured})
        self._samples, self._size = self._samples + 1, self._size + len(pair.image)
        if len(self._group) >= GROUP_ROWS or self._size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        from lance.file import LanceFileWriter

        if self._writer is None:
            self._writer = LanceFileWriter(str(self.out.path(self._scratch)), self._schema, version=STORAGE)
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._group, schema=self._schema))
        self._group, self._size = [], 0

    @property
    def _scratch(self) -> str:
        return f"{DATA}/{self.shard}.lance"

    def finish(self) -> dict[str, Any]:
        if self._group:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            name = self.out.adopt(self._scratch, lambda sha256: data_file(self.shard, "", sha256))
            write_fragment(self.out, self.shard, self._samples, self._schema, describe(self.out, [name], self._schema))
        return {"samples": self._samples}


def _header(pair: Pair) -> dict[str, Any]:
    header = upright_header(pair.image)
    if isinstance(header, ImageProblem):
        return {name: pair.row.get(name) for name in ("width", "height", "format")}
    return {"width": header.width, "height": header.height, "format": header.format}


def describe(out: FileTransaction, names: Sequence[str], schema: pa.Schema) -> list[dict[str, Any]]:
    """What Lance says of finished data files of this transaction, whose columns are some of ``schema``'s. Once."""
    import lance
    from lance.fragment import DataFile, FragmentMetadata

    dataset = lance.write_dataset(schema.empty_table(), str(out.path(TABLE)), data_storage_version=STORAGE)
    files = [DataFile.create(dataset, name.removeprefix(f"{DATA}/")) for name in names]
    listed: list[dict[str, Any]] = FragmentMetadata(0, files, 0).to_json()["files"]
    return listed


def write_fragment(out: FileTransaction, shard: str, rows: int, schema: pa.Schema, files: list[dict[str, Any]]) -> None:
    """Note a shard's data files for the version that is committed once all shards are there."""
    note = {"columns": columns_digest(schema), "physical_rows": rows, "files": files}
    with out.writing(fragment_file(shard)) as file:
        file.write(json.dumps(note, sort_keys=True).encode())
