"""What a search for withdrawn images finds, wherever it lies and whatever lists it."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capipe.errors import BadInput
from capipe.manifests.shards import uid_of
from capipe.manifests.withdrawal.absent import MOST_FAULTS, prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.stages.filter.select import uid_list

from ...conftest import photo, tar_bytes

IMAGE, OTHER = photo(1), photo(2)
UID = uid_of(IMAGE)
TAR = [("a.jpg", OTHER), ("b.jpg", IMAGE), ("b.txt", b"caption")]
TOLD = [("a.jpg", OTHER), ("a.json", json.dumps({"uid": UID}).encode())]


def parquet(**columns: list[object]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def row(**values: object) -> bytes:
    known = {"key": "k", "uid": UID, "status": "withdrawn", "error": "r", "text": None, "captions": []}
    return parquet(**{name: [value] for name, value in {**known, **values}.items()})


def kept_uids(uid: str) -> bytes:
    data = io.BytesIO()
    np.save(data, uid_list([uid_of(OTHER), uid]), allow_pickle=False)
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("loose.bin", IMAGE, "is the image"),
        ("deep/er/00000.tar", tar_bytes(TAR), "member 'b.jpg' is the image"),
        ("stray.part", tar_bytes(TAR), "member 'b.jpg' is the image"),
        ("00000.tar.gz", gzip.compress(tar_bytes(TAR)), "member 'b.jpg' is the image"),
        ("00000.tar", tar_bytes(TOLD), "member 'a.json' is of a listed image"),
        ("00000.tar", tar_bytes(TAR)[:1000], "cannot be read"),
        (
            "x",
            parquet(picture=[{"bytes": OTHER, "path": "a"}, {"bytes": IMAGE, "path": "b"}]),
            "row 1 embeds the image",
        ),
        ("x", parquet(image=[None, IMAGE]), "row 1 embeds the image"),
        ("x", parquet(uid=[None, UID.upper()]), "row 1 is of the image"),
        ("x", row(status="ok"), "row 0 is of the image"),
        ("x", row(text="alt"), "row 0 is of the image"),
        ("x", row(captions=["a"]), "row 0 is of the image"),
        ("x", b"PAR1 and no more", "cannot be read"),
        ("_capipe/uids.npy", kept_uids(UID), "is a listed uid, as one that is kept"),
        ("metadata.jsonl", json.dumps({"file_name": "a", "uid": UID}).encode() + b"\n", "line 1 is of a listed image"),
        (
            "_capipe/journal/0.jsonl",
            b'0 {"fingerprint":"f"}\n1 ' + json.dumps({"index": 0, "row": {"uid": UID, "text": "t"}}).encode() + b"\n",
            "line 2 is of a listed image",
        ),
        ("_capipe/redo/00000/line.json", b"[]", "is of a shard that is half replaced"),
    ],
)
def test_it_is_found_wherever_it_is(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    report = prove_absent(str(tmp_path / "in"), UidSet.of([UID]))
    assert report.faults and all(fault.startswith(f"{path}: ") for fault in report.faults)
    assert any(said in fault for fault in report.faults), report.faults


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("00000.tar", tar_bytes([("a.jpg", OTHER), ("a.json", b'{"uid": "theirs"}'), ("a.txt", UID.encode())])),
        ("x", row()),
        ("x", parquet(duplicate_of=[UID], group=[UID])),  # a uid is no image
        ("_capipe/uids.npy", kept_uids(uid_of(photo(3)))),
        ("_capipe/manifest.jsonl", b'{"shard": "00000"}\nnonsense\n'),
        ("uids.txt", UID.encode()),
        ("empty", b""),
    ],
)
def test_what_is_no_trace_is_not_reported(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    report = prove_absent(str(tmp_path / "in"), UidSet.of([UID]))
    assert report.faults == [] and (report.files, report.bytes, report.rows) == (1, len(data), data == row())


def test_what_belongs_to_a_row_is_found_by_its_key(tmp_path: Path) -> None:
    """A caption without its image, in a tar or in the lines of an export, beside the table that names its row."""
    (tmp_path / "_capipe/parts").mkdir(parents=True)
    (tmp_path / "7.parquet").write_bytes(row(key="b"))
    (tmp_path / "7.tar").write_bytes(tar_bytes([("a.jpg", OTHER), ("b.txt", b"caption")]))
    (tmp_path / "_capipe/parts/7.jsonl").write_bytes(b'{"id": "a"}\n{"id": "b"}\n{"key": "b"}\n')
    (tmp_path / "8.tar").write_bytes(tar_bytes([("b.jpg", OTHER), ("b.txt", b"of another shard")]))
    faults = [fault.removeprefix(f"{tmp_path}/") for fault in prove_absent(str(tmp_path), UidSet.of([UID])).faults]
    assert faults == [
        "7.tar: member 'b.txt' is of a listed row",
        "_capipe/parts/7.jsonl: line 2 is of a listed image, or of its row",
        "_capipe/parts/7.jsonl: line 3 is of a listed image, or of its row",
    ]


def test_links_are_not_followed_and_not_passed_over(tmp_path: Path) -> None:
    for folder in ("in", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere/a.jpg").write_bytes(IMAGE)
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (fault,) = prove_absent(str(tmp_path / "in"), UidSet.of([UID])).faults
    assert fault == f"{tmp_path}/in/linked: a link to a folder, which is not followed; look there, too"


def test_many_faults_are_counted(tmp_path: Path) -> None:
    for number in range(MOST_FAULTS + 5):
        (tmp_path / f"{number}.jpg").write_bytes(IMAGE)
    report = prove_absent(str(tmp_path), UidSet.of([UID]))
    assert len(report.faults) == MOST_FAULTS and report.more == 5
    with pytest.raises(BadInput, match="no such folder; --absent looks into an export"):
        prove_absent(str(tmp_path / "nowhere"), UidSet.of([UID]))
