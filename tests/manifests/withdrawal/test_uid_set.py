"""Lists of withdrawn uids: every way to write them, and what is refused."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.withdrawal.uid_set import EMPTY, UidSet, read_uids

UIDS = [f"{number:032x}" for number in (0xABCDEF, 1, 256, 2**128 - 1, 0)]


def written(folder: Path, text: str | bytes, name: str = "uids.txt") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(UIDS),
        "\n".join(UIDS) + "\n",
        "\r\n".join(uid.upper() for uid in UIDS) + "\r\n\r\n",
        "\n\n  " + " \n\t\n ".join(UIDS) + "\t \n\n",
        "\ufeff" + "\n".join([*UIDS, *UIDS]),
    ],
)
def test_blank_lines_case_and_repetitions_do_not_matter(tmp_path: Path, text: str) -> None:
    found, plain = read_uids(written(tmp_path, text)), UidSet.of(UIDS)
    assert found.sha256 == plain.sha256 and len(found) == len(UIDS)
    assert all(uid in found and uid.upper() in found for uid in UIDS) and "f" * 31 + "e" not in found
    assert sorted(found.shown(9)) == sorted(UIDS)  # also those that end in zeros


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_column_of_a_parquet_file(tmp_path: Path, kind: pa.DataType) -> None:
    values = [UIDS[0].upper(), None, "", *UIDS[1:]]
    table = pa.table({"uid": pa.array(UIDS[:1] * len(values)), "gone": pa.array(values).cast(kind)})
    pq.write_table(table, tmp_path / "list.parquet", row_group_size=2)
    assert read_uids(f"{tmp_path}/list.parquet:gone").sha256 == UidSet.of(UIDS).sha256
    assert len(read_uids(f"{tmp_path}/list.parquet")) == 1


def test_columns_of_uids_are_looked_up(tmp_path: Path) -> None:
    """Against Python's own sets: null, empty, short, long, non-ASCII and non-hexadecimal texts are in no set."""
    rng = random.Random(0)
    known = [f"{rng.getrandbits(128):032x}" for _ in range(500)]
    column = [
        *known[::7],
        None,
        "",
        "abc",
        "é" * 16,
        "z" * 32,
        known[0] + "0",
        *(f"{rng.getrandbits(128):032x}" for _ in "12"),
    ]
    rng.shuffle(column)
    for given in (known, known[:1], []):
        uids = UidSet.of(given)
        assert uids.mask(pa.array(column, pa.string())).tolist() == [value in given for value in column]
        sliced = pa.chunked_array([pa.array(column, pa.string())[3:20], pa.array([], pa.string())])
        assert uids.mask(sliced).tolist() == [value in given for value in column[3:20]]
        assert [value in uids for value in column] == [value in given for value in column]
    assert sorted(UidSet.of(known).missing_in(UidSet.of(known[3:])).shown(9)) == sorted(known[:3])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{UIDS[0]}\n\n{UIDS[1][:-1]}\n", "line 3 is no uid"),
        (f"{UIDS[0]}\n{'g' * 32}\n", "line 2 is no uid"),
        (f"{UIDS[0]} {UIDS[1]}\n", "line 1 is no uid"),
        ("uid\n", "line 1 is no uid ('uid'); a uid is the first 32 hex digits of the sha256 of an image's bytes"),
        (b"\x1f\x8b\x08" + bytes(40), "line 1 is no uid"),
        ("x" * 9000, "line 1 is no uid"),
    ],
)
def test_what_is_no_uid_is_refused_by_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as error:
        read_uids(path)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "named", "said"),
    [
        ({"uid": [UIDS[0], "short"]}, "", "row 2 of column 'uid' is no uid ('short')"),
        ({"id": UIDS}, "", "has no column 'uid' but id; write FILE.parquet:COLUMN"),
        ({"uid": [1, 2]}, "", "column 'uid' is of int64, not of text"),
        ({"uid": UIDS}, ":nope", "has no column 'nope' but uid"),
    ],
)
def test_a_parquet_without_uids_is_refused(
    tmp_path: Path, table: dict[str, list[object]], named: str, said: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    with pytest.raises(BadInput, match=f"^{tmp_path}/list.parquet: ") as error:
        read_uids(f"{tmp_path}/list.parquet{named}")
    assert said in str(error.value)


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"uids\.txt: no such file; --drop takes a list of uids, one per line"):
        read_uids(f"{tmp_path}/uids.txt")
    with pytest.raises(BadInput, match=r"cannot be read as a list of uids"):
        read_uids(written(tmp_path, b"no parquet", "list.parquet"))


def test_a_million_lines_take_no_object_each(tmp_path: Path) -> None:
    """Peak memory of Python and numpy: well under what a million texts of 32 characters take (over 80 MB)."""
    import numpy as np

    values = np.random.default_rng(0).bytes(16 << 20).hex()
    path = written(tmp_path, "\n".join(values[at : at + 32] for at in range(0, 32_000_000, 32)))
    tracemalloc.start()
    try:
        found = read_uids(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 1_000_000 and found.packed.nbytes == 16_000_000 and peak < 80 << 20
    assert values[:32] in found and values[31_999_968:32_000_000] in found and values[1:33] not in found


def test_nothing_is_in_an_empty_set(tmp_path: Path) -> None:
    assert UIDS[0] not in EMPTY and not EMPTY.mask(pa.array(UIDS)).any()
    assert len(read_uids(written(tmp_path, "\n \n"))) == 0
