"""The index of tars against Python's own tarfile; test_export_loaders has it against Energon's tool."""

from __future__ import annotations

import sqlite3
import struct
import tarfile
import uuid
from pathlib import Path

import pytest

from capipe.errors import ArtifactMismatch
from capipe.stages.export.energon import index_tar, index_uuid

from ..exporting import captioned, export, final_shards


def members(path: Path) -> list[tuple[str, str, int, int, int]]:
    """(key, part, header offset, data offset, size) as tarfile has it, and where it stopped as a last entry."""
    with tarfile.open(path) as tar:
        found = [(*m.name.rsplit(".", 1), m.offset, m.offset_data, m.size) for m in tar]
        return [*found, ("", "", tar.offset, 0, 0)]


@pytest.mark.parametrize("make", [final_shards, captioned])
def test_offsets_are_tarfiles(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    export(make(tmp_path / "source"), out)
    database = sqlite3.connect(out / ".nv-meta/index.sqlite")
    for number, path in enumerate(sorted(out.glob("*.tar"))):
        *expected, end = members(path)
        keys = list(dict.fromkeys(key for key, *_ in expected))
        starts = [next(m[2] for m in expected if m[0] == key) for key in keys] + [end[2]]
        data = Path(f"{path}.idx").read_bytes()
        assert list(struct.unpack(f"{len(data) // 8}Q", data)) == starts
        samples = database.execute("select * from samples where tar_file_id = ? order by sample_index", [number])
        rows = zip(keys, starts, starts[1:], strict=False)
        assert samples.fetchall() == [(number, key, i, a, b - a) for i, (key, a, b) in enumerate(rows)]
        parts = database.execute("select * from sample_parts where tar_file_id = ? order by rowid", [number]).fetchall()
        assert parts == [(number, keys.index(key), part, offset, size) for key, part, _, offset, size in expected]
    database.close()


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    source = final_shards(tmp_path / "final")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((source / "00000.tar").read_bytes()[:5000])
    with cut.open("rb") as stream, pytest.raises(ArtifactMismatch, match=r"cut\.tar: .*ends"):
        index_tar(stream, str(cut))


def test_the_identity_is_of_the_tars() -> None:
    first, second = index_uuid(["a", "b"]), index_uuid(["a", "c"])
    assert first == index_uuid(["a", "b"]) != second
    assert uuid.UUID(first.decode()).version == 4
