"""Parquet columns flattened to one text or number per row, to show, search, filter and compare.

A list of captions becomes a text column per caption name (``caption_dense``), with status and length; graded captions
also get the share of right answers, and their answers in words; questions become their number and their text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...manifests.schema import LATER

_LEARNT = 64  # rows read to learn the captions' names
_SHOWN_TEXTS = ("text", "caption", "re_caption", "org_caption")
_LEFT_OUT = ("raw", "scene", "signature")  # not human-readable


@dataclass(frozen=True)
class Flat:
    """A flat column. ``leaves``: its Parquet columns; ``make``: computes one value per row from a table of them.

    ``prose``: human-readable text: searched, and compared with other captions.
    """

    name: str
    type: pa.DataType
    leaves: tuple[str, ...]
    make: Callable[[pa.Table], pa.Array]
    prose: bool = False


def flat_columns(parquet: pq.ParquetFile) -> list[Flat]:
    """Flat columns of a file. Reads its first rows for the captions' names."""
    paths = [parquet.schema.column(index).path for index in range(len(parquet.schema.names))]
    columns: list[Flat] = []
    for field in parquet.schema_arrow:
        if field.name in _LEFT_OUT:
            continue
        if _is_number(field.type) or pa.types.is_string(field.type):
            columns.append(Flat(field.name, field.type, (field.name,), partial(_plain, field), _is_prose(field.name)))
        elif pa.types.is_list(field.type):
            columns += _of_list(parquet, field, [path for path in paths if path.split(".")[0] == field.name])
    return columns


def identifier(text: str) -> str:
    """``text`` as an identifier for filter expressions."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")
    return name if name and not name[0].isdigit() else f"_{name}"


def _is_prose(name: str) -> bool:
    return name in _SHOWN_TEXTS


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def _plain(field: pa.Field, table: pa.Table) -> pa.Array:
    if field.name in LATER and field.name not in table.column_names:  # a shard of an earlier version
        return pa.nulls(table.num_rows, field.type)
    return table.column(field.name).combine_chunks()


# --- lists -----------------------------------------------------------------------------------------------------------


def _of_list(parquet: pq.ParquetFile, field: pa.Field, paths: list[str]) -> Iterator[Flat]:
    inside = field.type.value_type
    if pa.types.is_string(inside):
        yield Flat(field.name, pa.string(), tuple(paths), partial(_joined, field.name, None))
    elif pa.types.is_struct(inside) and field.name == "captions" and inside.get_field_index("name") >= 0:
        yield from _captions(parquet, inside, paths)
    elif pa.types.is_struct(inside) and field.name == "open_answers":
        yield from _answers(parquet, {path.rsplit(".", 1)[1]: path for path in paths})
    elif pa.types.is_struct(inside) and field.name == "open_questions":
        leaves = {path.rsplit(".", 1)[1]: path for path in paths}
        yield Flat(field.name, pa.int32(), (leaves["id"],), partial(_count, field.name, None))
        make = partial(_joined, field.name, "question")
        yield Flat(f"{field.name}_text", pa.string(), (leaves["question"],), make)
    elif pa.types.is_struct(inside) and field.name == "questions":
        leaves = {path.rsplit(".", 1)[1]: path for path in paths if path.count(".") == paths[0].count(".")}
        yield Flat("questions", pa.int32(), (leaves["id"],), partial(_count, field.name, None))
        if "status" in leaves:
            yield Flat("questions_ok", pa.int32(), (leaves["status"],), partial(_count, field.name, "ok"))
        if "question" in leaves:
            make = partial(_joined, field.name, "question")
            yield Flat("questions_text", pa.string(), (leaves["question"],), make, prose=True)


def _captions(parquet: pq.ParquetFile, inside: pa.StructType, paths: list[str]) -> Iterator[Flat]:
    leaves = {path.rsplit(".", 1)[1]: path for path in paths if "answers" not in path}
    answers = tuple(path for path in paths if path.endswith((".right", ".scored")))
    for name in _names(parquet, leaves["name"]):
        word = identifier(name)
        for field, title in (("text", "caption"), ("status", "status"), ("n_tokens", "tokens")):
            if field in leaves:
                make, type_ = partial(_of_caption, name, field), inside.field(field).type
                needed = (leaves["name"], leaves[field])
                yield Flat(f"{title}_{word}", type_, needed, make, prose=field == "text")
        if answers:
            yield Flat(f"right_{word}", pa.float64(), (leaves["name"], *answers), partial(_share_right, name))


def _answers(parquet: pq.ParquetFile, leaves: dict[str, str]) -> Iterator[Flat]:
    """Answers in words from the caption of each name."""
    for name in _names(parquet, leaves["name"]):
        make = partial(_answered, name)
        yield Flat(f"answers_{identifier(name)}", pa.string(), (leaves["name"], leaves["answer"]), make)


def _names(parquet: pq.ParquetFile, leaf: str) -> list[str]:
    """Names of captions in the first rows of a list column."""
    batch = next(iter(parquet.iter_batches(_LEARNT, columns=[leaf], use_threads=False)), None)
    lists = [] if batch is None else batch.column(0).to_pylist()
    return list(dict.fromkeys(each["name"] for row in lists for each in row or [] if each["name"]))


def _answered(name: str, table: pa.Table) -> pa.Array:
    """Each row's answers in words from the caption of this name; null without one."""
    lists, offsets = _list(table, "open_answers")
    named = np.asarray(pc.fill_null(pc.equal(pc.struct_field(lists.values, "name"), name), False))
    ends = np.concatenate([[0], np.cumsum(named)])[offsets]
    texts = pc.fill_null(pc.struct_field(lists.values, "answer"), "–").filter(pa.array(named))
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), texts), "; ")
    return pc.if_else(pa.array(np.diff(ends) > 0), joined, pa.scalar(None, pa.string()))


def _list(table: pa.Table, name: str) -> tuple[pa.ListArray, np.ndarray]:
    """A list column as one array, and its offsets (rows + 1)."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column, np.asarray(column.offsets)


def _places(lists: pa.ListArray, offsets: np.ndarray, name: str) -> pa.Array:
    """For each row, the index of its caption of this name among all values; null without one."""
    named = pc.equal(pc.struct_field(lists.values, "name"), name)
    mask = np.asarray(pc.fill_null(named, False))[offsets[0] : offsets[-1]]
    places = np.flatnonzero(mask) + offsets[0]
    rows = np.searchsorted(offsets, places, side="right") - 1
    indices = np.full(len(lists), -1, np.int64)
    indices[rows[::-1]] = places[::-1]  # the first of this name, if there are two
    return pa.array(indices, mask=indices < 0)


def _of_caption(name: str, field: str, table: pa.Table) -> pa.Array:
    lists, offsets = _list(table, "captions")
    return pc.struct_field(lists.values, field).take(_places(lists, offsets, name))


def _share_right(name: str, table: pa.Table) -> pa.Array:
    """Share of scored presentations answered right from the caption of this name."""
    lists, offsets = _list(table, "captions")
    places = _places(lists, offsets, name)
    answers = pc.struct_field(lists.values, "answers")
    ends = np.asarray(answers.offsets)
    sums = {}
    for field in ("right", "scored"):
        values = np.asarray(pc.fill_null(pc.struct_field(answers.values, field), 0), np.int64)
        total = np.concatenate([[0], np.cumsum(values)])
        sums[field] = total[ends[1:]] - total[ends[:-1]]
    share = np.divide(sums["right"], sums["scored"], out=np.full(len(ends) - 1, np.nan), where=sums["scored"] > 0)
    return pa.array(share, from_pandas=True).take(places)


def _count(name: str, status: str | None, table: pa.Table) -> pa.Array:
    lists, offsets = _list(table, name)
    if status is None:
        return pa.array(np.diff(offsets).astype(np.int32))
    same = np.asarray(pc.fill_null(pc.equal(pc.struct_field(lists.values, "status"), status), False))
    total = np.concatenate([[0], np.cumsum(same)])
    return pa.array((total[offsets[1:]] - total[offsets[:-1]]).astype(np.int32))


def _joined(name: str, field: str | None, table: pa.Table) -> pa.Array:
    lists, offsets = _list(table, name)
    texts = lists.values if field is None else pc.struct_field(lists.values, field)
    plain = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pc.fill_null(texts, ""))
    return pc.binary_join(plain, "; ")
