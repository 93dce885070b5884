"""Tables of the user's own, in Parquet, whose columns are joined with rows of shards: by uid, or by shard and key.

A table may come from anybody. Footers are checked before anything is decompressed, files of a folder must lie in it,
and values are numbers and text alone. It is read into sorted arrays: 16 bytes a row that identify it, and each column's
own width (4 bytes for a float32, and a bit). While it is sorted it takes 24 bytes a row more, and one column at a time
twice (bench/stages/join.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import BadInput
from ..files.outside import Reach, is_url, refusal, source_folder
from ..files.patterns import braced, is_pattern
from ..files.storage import open_parquet, oversized_group, parquet_of
from ..files.store_errors import StoreUnavailable
from ..files.stores import filesystem
from ..files.tar import printable
from .columns import is_text, joined_columns, joined_values
from .packed_uids import HINT, Mask, Packed, packed_of

IDENTITY = ("shard", "key", "uid")  # columns that identify a row; a table is joined by all of them that it has
MAX_ROWS = (1 << 31) - 1
_BATCH = 1 << 16
_CHUNK = 1 << 22
_SUFFIX = ".parquet"
_NEEDED = "it needs a column `uid`, or `shard` and `key`, to be joined with images"


@dataclass(frozen=True)
class ParquetTable:
    """A table whose rows are not read yet. ``given``: as the user named it. ``by``: its columns that identify rows.

    ``columns``: those that can be joined, with the types that they have in its files. ``digest``: sha256 of its
    contents, the files in the order of their names. ``changes``: size and time of each local file.
    """

    given: str
    files: tuple[str, ...]
    rows: int
    by: tuple[str, ...]
    columns: Mapping[str, pa.DataType]
    digest: str
    changes: tuple[tuple[int, int], ...]


def open_table(given: str) -> ParquetTable:
    """The table in a file, a folder of files or a pattern, by its footers and the digest of its bytes.

    Raises BadInput, naming the file and the reason, if it cannot be joined or its files differ in their columns.
    """
    files = _files(given)
    changes = _changes(files)
    first: tuple[tuple[str, ...], dict[str, pa.DataType]] | None = None
    rows, digest = 0, hashlib.sha256()
    for url in files:
        with _opened(url) as (parquet, sha256):
            shape = _shape(url, parquet.schema_arrow)
            rows += parquet.metadata.num_rows
        digest.update(bytes.fromhex(sha256))
        if first is None:
            first = shape
        elif shape != first:
            _refuse_other_columns(url, shape, files[0], first)
    assert first is not None
    if not rows:
        raise BadInput(f"{given}: has no row, so there is nothing to join")
    if rows > MAX_ROWS:
        raise BadInput(f"{given}: {rows:,} rows, over the limit of {MAX_ROWS:,}; give the part that is of these shards")
    return ParquetTable(given, files, rows, *first, digest.hexdigest(), changes)


def _shape(url: str, schema: pa.Schema) -> tuple[tuple[str, ...], dict[str, pa.DataType]]:
    """Columns that identify rows, and those that can be joined. Raises BadInput."""
    names = schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"{url}: has two columns {printable(twice[:60])!r}; rename one")
    by = tuple(name for name in IDENTITY if name in names)
    if "uid" not in by and not {"shard", "key"} <= {*by}:
        there = ", ".join(printable(name[:40]) for name in names[:8]) + (", …" if len(names) > 8 else "")
        raise BadInput(f"{url}: {_NEEDED}; its columns are {there or 'none'}")
    for name in by:
        if not is_text(kind := schema.field(name).type):
            raise BadInput(f"{url}: column {name!r} is of {kind}, not of text; write it as text, zeros before it, too")
    columns = joined_columns(schema, frozenset(IDENTITY))
    if not columns:
        raise BadInput(f"{url}: has no column of numbers, truth values or text beside {', '.join(by)}; nothing to join")
    return by, columns


def _refuse_other_columns(
    url: str,
    shape: tuple[tuple[str, ...], dict[str, pa.DataType]],
    first_url: str,
    first: tuple[tuple[str, ...], dict[str, pa.DataType]],
) -> NoReturn:
    ours, theirs = ({**dict.fromkeys(by, "identity"), **columns} for by, columns in (shape, first))
    name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
    here, there = (f"of {kinds[name]}" if name in kinds else "missing" for kinds in (ours, theirs))
    text = f"{url}: column {name!r} is {here}, and {there} in {first_url}"
    raise BadInput(f"{text}; write all files of the table alike")


# --- files -----------------------------------------------------------------------------------------------------------


def _files(given: str) -> tuple[str, ...]:
    """The files of a table, sorted. Raises BadInput if there is none, or one that does not belong to it."""
    if is_pattern(given):
        found = [url for part in braced(given) for url in _glob(part)]
    else:
        fs, path = filesystem(given)
        if fs.isdir(path):
            found = _remote(given) if is_url(given) else _local(given)
        elif fs.exists(path):
            found = [given]
        else:
            raise BadInput(
                f"{given}: no such file or folder; --scores takes artifacts, and Parquet with a column `uid`"
            )
    if not found:
        raise BadInput(f"{given}: not an artifact of capipe, and no {_SUFFIX} file is in it; check the path")
    return tuple(sorted(found))


def _glob(url: str) -> list[str]:
    fs, path = filesystem(url)
    return [fs.unstrip(name) if is_url(url) else name for name in fs.glob(path)]


def _local(folder: str) -> list[str]:
    """Files below a local folder, hidden ones left out; a link may not lead out of it."""
    reach, found = Reach(source=source_folder(folder)), []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in names:
            if name.endswith(_SUFFIX) and not name.startswith((".", "_")):
                path = str(Path(place) / name)
                if (problem := refusal(path, reach)) is not None:
                    raise BadInput(problem.removesuffix("; --follow-links takes it"))
                found.append(path)
    return found


def _remote(folder: str) -> list[str]:
    fs, path = filesystem(folder.rstrip("/"))
    names = (name for name in fs.find(path) if name.endswith(_SUFFIX))
    return [fs.unstrip(name) for name in names if not name.rpartition("/")[2].startswith((".", "_"))]


def _changes(files: Sequence[str]) -> tuple[tuple[int, int], ...]:
    facts = (Path(url).stat() for url in files if not is_url(url))
    return tuple((fact.st_size, fact.st_mtime_ns) for fact in facts)


@contextmanager
def _opened(url: str) -> Iterator[tuple[pq.ParquetFile, str]]:
    """A file of a table, and the sha256 of its bytes. Raises BadInput if it is none, or would not fit in memory."""
    try:
        if is_url(url):
            fs, path = filesystem(url)
            data = fs.read(path)
            parquet, sha256 = parquet_of(data), hashlib.sha256(data).hexdigest()
        else:
            parquet, sha256 = open_parquet(url), _sha256(url)
        problem = oversized_group(parquet.metadata)
        if problem is not None:
            parquet.close()
            raise BadInput(f"{url}: {problem}; write it in smaller row groups")
        with parquet:
            yield parquet, sha256
    except StoreUnavailable:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{url}: cannot be read as Parquet ({reason}); write it again, or check the path") from None


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


# --- rows ------------------------------------------------------------------------------------------------------------


def identities(columns: Mapping[str, pa.Array]) -> tuple[Packed, Mask]:
    """(n,) 16 bytes for each row, and which rows have them: null in none of ``columns``, all text, by name.

    Those of a uid alone are the uid itself, else a hash (BLAKE2b, RFC 7693) of all columns.
    """
    if columns.keys() == {"uid"}:
        return packed_of(columns["uid"])
    parts = [columns[name].cast(pa.string()) for name in IDENTITY if name in columns]
    if "uid" in columns:
        parts[-1] = pc.ascii_lower(parts[-1])
    texts = pc.binary_join_element_wise(*parts, "\0")
    valid: Mask = np.array(texts.is_valid(), dtype=bool)
    hashed = b"".join(_hash(text) for text in texts.drop_null().to_pylist())
    packed = np.zeros(len(texts), "S16")
    packed[valid] = np.frombuffer(hashed, "S16")
    return packed, valid


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class SortedTable:
    """A table in memory. ``ids``: (n,) of 16 bytes, sorted, each once; ``columns``: (n,) each, in the same order."""

    by: tuple[str, ...]
    ids: Packed
    columns: Mapping[str, pa.Array]

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, shard: str, keys: pa.Array, uids: pa.Array) -> npt.NDArray[np.int64]:
        """(m,) for each row of a shard, by its key and uid, the index of the table's row; -1 if there is none."""
        rows = {"shard": pa.array([shard] * len(keys), pa.string()), "key": keys, "uid": uids}
        ids, valid = identities({name: rows[name] for name in self.by})
        if not len(self):
            return np.full(len(ids), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.where(valid & (self.ids[places] == ids), places, -1)

    def values(self, name: str, places: npt.NDArray[np.int64]) -> pa.Array:
        """(m,) values of a column at ``places``, null for -1."""
        return self.columns[name].take(pa.array(places, mask=places < 0))


def read_table(table: ParquetTable, columns: Sequence[str]) -> SortedTable:
    """Read some columns of all rows. Rows that nothing identifies (null) are left out.

    Raises BadInput if a uid is none, if two rows of one identity differ, or if a file changed since it was opened.
    """
    ids = np.empty(table.rows, "S16")
    parts: dict[str, list[pa.Array]] = {name: [] for name in columns}
    filled = 0
    for url in table.files:
        with _opened_to_read(url) as parquet:
            row = 1
            for batch in parquet.iter_batches(_BATCH, columns=[*table.by, *columns], use_threads=False):
                packed, used = identities({name: _text(batch.column(name)) for name in table.by})
                if "uid" in table.by:
                    _refuse_no_uid(url, batch.column("uid"), row)
                count = int(used.sum())
                if filled + count > table.rows:
                    raise _changed(table)
                ids[filled : filled + count] = packed[used]
                for name, kept in parts.items():
                    values = joined_values(batch.column(name), pa.large_string())
                    kept.append(values if count == len(batch) else values.filter(pa.array(used)))
                filled, row = filled + count, row + len(batch)
    if _changes(table.files) != table.changes or not all(parts.values()):
        raise _changed(table)
    return _sorted(table, ids[:filled], parts)


@contextmanager
def _opened_to_read(url: str) -> Iterator[pq.ParquetFile]:
    try:
        with open_parquet(url) as parquet:
            yield parquet
    except StoreUnavailable:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{url}: cannot be read as Parquet ({reason}); write it again, or check the path") from None


def _changed(table: ParquetTable) -> BadInput:
    return BadInput(f"{table.given}: changed while it was read; run the command again when it is complete")


def _text(column: pa.Array) -> pa.Array:
    return column.cast(pa.string())


def _refuse_no_uid(url: str, column: pa.Array, row: int) -> None:
    """Raise BadInput for the first value that is neither null nor a uid. ``row``: number of the first, from 1."""
    text = _text(column)
    _, valid = packed_of(text)
    bad = np.array(text.is_valid(), dtype=bool) & ~valid
    if bad.any():
        first = int(np.argmax(bad))
        value = text[first].as_py()
        shown = printable(value[:60]) + ("…" if len(value) > 60 else "")
        raise BadInput(f"{url}: row {row + first} of column 'uid' is no uid ({shown!r}); {HINT}")


def _sorted(table: ParquetTable, ids: Packed, parts: dict[str, list[pa.Array]]) -> SortedTable:
    """The table in the order of its ids, repeated rows once."""
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    columns = {}
    for name in list(parts):
        whole = pa.concat_arrays(parts.pop(name))
        columns[name] = whole.take(pa.array(order))
    del order
    again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
    if len(again):
        for name, column in columns.items():
            _refuse_differing(table, name, column, ids, again)
        first = np.ones(len(ids), bool)
        first[again] = False
        ids, columns = ids[first], {name: column.filter(pa.array(first)) for name, column in columns.items()}
    return SortedTable(table.by, ids, columns)


def _refuse_differing(
    table: ParquetTable, name: str, column: pa.Array, ids: Packed, again: npt.NDArray[np.int64]
) -> None:
    """Raise BadInput if a row of ``again`` has another value than the row before it, which is of the same identity."""
    one, other = column.take(pa.array(again - 1)), column.take(pa.array(again))
    same = pc.or_(pc.fill_null(pc.equal(one, other), False), pc.and_(pc.is_null(one), pc.is_null(other)))
    differs = ~np.array(same, dtype=bool)
    if differs.any():
        at = int(np.argmax(differs))
        values = " and ".join(printable(str(side[at].as_py())[:40]) for side in (one, other))
        which = (
            f"uid {ids[again[at]].ljust(16, bytes(1)).hex()}"
            if table.by == ("uid",)
            else f"one {' and '.join(table.by)}"
        )
        text = f"{table.given}: two rows of {which} have different values of {name!r} ({values})"
        raise BadInput(f"{text}; keep one row of each {' and '.join(table.by)}")
