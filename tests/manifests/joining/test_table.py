"""Tables of users: what is joined, by what, and that bad ones are refused in a line before anything is joined."""

from __future__ import annotations

import os
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.joining.columns import joined_columns, joined_type
from capipe.manifests.joining.table import SortedTable, identities, open_table, read_table


def uid(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128):032x}"


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(path: Path | str, *columns: str) -> SortedTable:
    table = open_table(str(path))
    return read_table(table, columns or list(table.columns))


def slow(
    rows: list[dict[str, Any]], by: tuple[str, ...], wanted: list[dict[str, Any]], column: str
) -> list[float | None]:
    """The join by a dictionary of Python's, row by row."""
    known = {tuple(row[name] for name in by): row[column] for row in rows if None not in [row[name] for name in by]}
    return [known.get(tuple(row[name] for name in by)) for row in wanted]


@pytest.mark.parametrize("by", [("uid",), ("shard", "key"), ("key", "uid"), ("shard", "key", "uid"), ("shard", "uid")])
def test_a_join_is_that_of_a_dictionary(by: tuple[str, ...], tmp_path: Path) -> None:
    """In any order of rows, over several files, with rows that nothing identifies and rows of other images."""
    rng = random.Random(str(by))
    rows = [
        {
            "shard": f"{number // 100:05d}",
            "key": f"k{number % 100:03d}",
            "uid": None if number % 17 == 0 else uid(number),
            "x": None if number % 11 == 0 else number / 7,
        }
        for number in range(700)
    ]
    written = [row for row in rows if rng.random() < 0.7]
    rng.shuffle(written)
    for part in range(3):
        mine = written[part::3]
        write(tmp_path / f"t/{part}.parquet", {n: [row[n] for row in mine] for n in (*by, "x")}, row_group_size=50)
    table = read(tmp_path / "t")
    assert table.by == by and (table.ids[:-1] < table.ids[1:]).all()
    found: list[float | None] = []
    for shard in range(7):
        own = rows[shard * 100 : shard * 100 + 100]
        places = table.places(f"{shard:05d}", pa.array([r["key"] for r in own]), pa.array([r["uid"] for r in own]))
        found += table.values("x", places).to_pylist()
    assert found == slow(written, by, rows, "x")
    assert 100 < sum(value is not None for value in found) < 700


def test_uids_in_capitals_are_the_same(tmp_path: Path) -> None:
    for by in (["uid"], ["shard", "uid"]):
        columns = {"uid": [uid(1).upper()], "shard": ["00000"], "x": [3]}
        table = read(write(tmp_path / "t.parquet", {name: columns[name] for name in [*by, "x"]}))
        assert table.places("00000", pa.array(["a"]), pa.array([uid(1)])).tolist() == [0]


def test_types_are_few(tmp_path: Path) -> None:
    """Truth values and decimals become numbers, NaN is null, and what is no number and no text is left out."""
    columns = {
        "uid": pa.array([uid(0), uid(1)]).dictionary_encode(),
        "flag": pa.array([True, None]),
        "price": pa.array([Decimal("1.25"), None], pa.decimal128(9, 2)),
        "half": pa.array(np.array([0.5, np.nan], np.float16)),
        "score": pa.array([float("nan"), 0.1], pa.float32()),
        "big": pa.array([2**63, 1], pa.uint64()),
        "site": pa.array(["a", None]).dictionary_encode(),
        "long": pa.array(["b", "c"], pa.large_string()),
        "tags": pa.array([["x"], []]),
        "day": pa.array([1, 2], pa.date32()),
        "with space": pa.array([1, 2]),
        "and": pa.array([1, 2]),
        "__index_level_0__": pa.array([1, 2]),
    }
    path = write(tmp_path / "t.parquet", columns)
    found = open_table(str(path))
    kinds = {name: str(joined_type(kind)) for name, kind in found.columns.items()}
    assert kinds == {
        "flag": "int8",
        "price": "double",
        "half": "float",
        "score": "float",
        "big": "uint64",
        "site": "string",
        "long": "string",
    }
    table = read(path)
    places = table.places("s", pa.array(["k"] * 3), pa.array([uid(1), uid(0), uid(2)]))
    values = {name: table.values(name, places).to_pylist() for name in found.columns}
    assert values == {
        "flag": [None, 1, None],
        "price": [None, 1.25, None],
        "half": [None, 0.5, None],
        "score": [pytest.approx(0.1), None, None],
        "big": [1, 2**63, None],
        "site": [None, "a", None],
        "long": ["c", "b", None],
    }
    assert joined_columns(pa.schema([("uid", pa.string()), ("x", pa.int8())]), frozenset({"uid"})) == {"x": pa.int8()}


def test_identities_of_several_columns_do_not_run_into_each_other() -> None:
    one, _ = identities({"shard": pa.array(["a", "ab"]), "key": pa.array(["bc", "c"])})
    assert one[0] != one[1]


def test_a_table_is_its_contents(tmp_path: Path) -> None:
    columns = {"uid": [uid(1), uid(2)], "x": [1, 2]}
    first = open_table(str(write(tmp_path / "a/t.parquet", columns)))
    assert first.rows == 2 and open_table(str(tmp_path / "a")).digest == first.digest
    assert open_table(str(write(tmp_path / "other.parquet", columns))).digest == first.digest
    assert open_table(str(tmp_path / "a/*.parquet")).digest == first.digest
    assert open_table(str(write(tmp_path / "b.parquet", {**columns, "x": [1, 3]}))).digest != first.digest


def test_repeated_rows(tmp_path: Path) -> None:
    """Of equal rows one counts; of different ones none can."""
    ids = [uid(1), uid(2), uid(1), uid(1)]
    columns = {"uid": ids, "x": [0.5, 1.0, 0.5, 0.5], "y": [None, 1, None, None], "url": list("abcd")}
    path = write(tmp_path / "t.parquet", columns)
    assert len(read(path, "x", "y")) == 2
    with pytest.raises(
        BadInput, match=rf"t.parquet: two rows of uid {uid(1)} have different values of 'url' \(a and c"
    ):
        read(path, "x", "url")
    write(path, {**columns, "y": [None, 1, None, 3]})
    with pytest.raises(BadInput, match=r"different values of 'y' \(None and 3\); keep one row of each uid"):
        read(path, "x", "y")
    write(path, {"shard": ["0"] * 2, "key": ["a", "a"], "x": [1, 2]})
    with pytest.raises(BadInput, match=r"two rows of one shard and key have different values of 'x' \(1 and 2\)"):
        read(path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"key": ["a"], "x": [1]}, r"t.parquet: it needs a column `uid`, or `shard` and `key`, .* columns are key, x$"),
        ({"uid": [1], "x": [1]}, r"column 'uid' is of int64, not of text; write it as text"),
        ({"shard": ["0"], "key": [7], "x": [1]}, r"column 'key' is of int64, not of text"),
        ({"uid": [uid(1)]}, r"has no column of numbers, truth values or text beside uid; nothing to join"),
        ({"uid": [uid(1)], "tags": [["a"]]}, r"has no column of numbers"),
        ({"uid": pa.array([], pa.string()), "x": pa.array([], pa.int8())}, r"t.parquet: has no row"),
        (
            {"uid": [uid(1), "a photo"], "x": [1, 2]},
            r"row 2 of column 'uid' is no uid \('a photo'\); a uid is the first",
        ),
        ({"uid": [uid(1)[:31] + "g"], "x": [1]}, r"row 1 of column 'uid' is no uid"),
        ({"shard": ["0"], "uid": ["\x1b[31m" + "x" * 90], "x": [1]}, r"row 1 of column 'uid' is no uid \('.{60,}…'\)"),
    ],
)
def test_what_cannot_be_joined_is_refused(columns: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        read(write(tmp_path / "t.parquet", columns))
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([uid(1)]), pa.array([1]), pa.array([2])], ["uid", "x", "x"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(BadInput, match="has two columns 'x'; rename one"):
        open_table(str(tmp_path / "t.parquet"))


def test_files_of_one_table_are_alike(tmp_path: Path) -> None:
    write(tmp_path / "t/0.parquet", {"uid": [uid(1)], "x": [1]})
    other = write(tmp_path / "t/1.parquet", {"uid": [uid(2)], "x": [1.0]})
    with pytest.raises(BadInput, match=r"1.parquet: column 'x' is of double, and of int64 in .*0.parquet; write all"):
        open_table(str(tmp_path / "t"))
    write(other, {"uid": [uid(2)], "y": [1]})
    with pytest.raises(BadInput, match=r"1.parquet: column 'x' is missing, and of int64 in"):
        open_table(str(tmp_path / "t"))


def test_places_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file or folder; --scores takes artifacts"):
        open_table(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"not an artifact of capipe, and no \.parquet file is in it"):
        open_table(str(tmp_path / "empty"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(BadInput, match=r"bad.parquet: cannot be read as Parquet \(.*\); write it again") as refused:
        open_table(str(tmp_path / "bad.parquet"))
    assert "\n" not in str(refused.value)
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(BadInput, match=r"pipe\.parquet: cannot be read as Parquet"):
        open_table(str(tmp_path / "pipe.parquet"))


def test_a_folder_does_not_lead_out(tmp_path: Path) -> None:
    """Who shares a folder of scores could link to any Parquet of the reader's; hidden files are no part of a table."""
    write(tmp_path / "secret.parquet", {"uid": [uid(1)], "x": [1]})
    write(tmp_path / "t/0.parquet", {"uid": [uid(2)], "x": [2]})
    write(tmp_path / "t/.hidden.parquet", {"uid": [uid(3)], "y": [2]})
    write(tmp_path / "t/_tmp/1.parquet", {"uid": [uid(3)], "y": [2]})
    assert open_table(str(tmp_path / "t")).rows == 1
    (tmp_path / "t/1.parquet").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(BadInput, match=r"1\.parquet: leads out of its source"):
        open_table(str(tmp_path / "t"))


def test_a_file_that_would_not_fit_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", {"uid": [uid(n) for n in range(100)], "x": [0] * 100})
    monkeypatch.setattr("capipe.manifests.files.storage.MAX_GROUP_VALUES", 99)
    with pytest.raises(BadInput, match=r"t.parquet: a row group of \d+ bytes and 100 values in a column; write it"):
        open_table(str(path))


def test_a_table_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"uid": [uid(1)], "x": [1]})
    opened = open_table(str(path))
    write(path, {"uid": [uid(1), uid(2)], "x": [1, 2]})
    with pytest.raises(BadInput, match=r"t\.parquet: changed while it was read; run the command again"):
        read_table(opened, ["x"])


def test_a_table_in_a_store(s3: str, tmp_path: Path) -> None:
    from capipe.manifests.files.stores import filesystem

    path = write(tmp_path / "t.parquet", {"uid": [uid(1)], "x": [1]})
    for url in (f"{s3}/tables/t.parquet", f"{s3}/tables/more/u.parquet"):
        fs, inner = filesystem(url)
        fs.write(path.read_bytes() if url.endswith("t.parquet") else _other(tmp_path).read_bytes(), inner)
    assert len(read(f"{s3}/tables/t.parquet")) == 1
    assert len(read(f"{s3}/tables")) == 2 == len(read(f"{s3}/tables/{{t,more/u}}.parquet"))


def _other(folder: Path) -> Path:
    return write(folder / "u.parquet", {"uid": [uid(2)], "x": [2]})
