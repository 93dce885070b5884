"""Compressed tars read as plain ones: whole, cut, damaged, in any order."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests.files.compressed import plain, tar_stem
from capipe.manifests.files.tar import Member, scan
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.shards import InputShard, RowReader, expand
from capipe.manifests.status import Status

from ...conftest import photo, tar_bytes


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}
FILES = {f"{number}.jpg": photo(number, (300, 200)) for number in range(20)}
TAR = tar_bytes(FILES)


def scanned(data: bytes) -> list[Member]:
    return list(scan(io.BytesIO(data), read_data=True))


@pytest.mark.parametrize("kind", PACK)
def test_members_digest_and_offsets(kind: str) -> None:
    packed = PACK[kind](TAR)
    digest = hashlib.sha256()
    members = list(scan(io.BytesIO(packed), read_data=True, digest=digest))
    assert {m.name: m.data for m in members} == FILES
    assert digest.hexdigest() == hashlib.sha256(packed).hexdigest()
    headers = list(scan(io.BytesIO(packed)))
    assert [(m.name, m.offset, m.size) for m in headers] == [(m.name, m.offset, m.size) for m in scanned(TAR)]
    for order in (headers, headers[::-1], [headers[5], headers[2], headers[19], headers[0]]):
        with plain(io.BytesIO(packed)) as stream:
            for member in order:
                stream.seek(member.offset)
                assert stream.read(member.size) == FILES[member.name]


@pytest.mark.parametrize("kind", PACK)
def test_parts_packed_one_by_one_are_read_through(kind: str) -> None:
    half = len(TAR) // 2
    assert len(scanned(PACK[kind](TAR[:half]) + PACK[kind](TAR[half:]))) == len(FILES)


@pytest.mark.parametrize("kind", PACK)
def test_a_cut_gives_what_is_whole_and_says_so(kind: str) -> None:
    packed = PACK[kind](TAR)
    for cut in (8, len(packed) // 2, len(packed) - 1):
        *whole, last = scanned(packed[:cut])
        assert last.damaged and last.problem
        assert all(m.data == FILES[m.name] for m in whole if m.problem is None)
    assert sum(m.problem is None for m in whole) == len(FILES)


@pytest.mark.parametrize("kind", PACK)
def test_damage_never_raises_and_is_told(kind: str) -> None:
    packed = PACK[kind](TAR)
    for at in range(10, len(packed) - 30, len(packed) // 40):
        data = bytearray(packed)
        data[at] ^= 0xFF
        members = scanned(bytes(data))
        same = {m.name: m.data for m in members if m.problem is None} == FILES
        assert same or any(m.damaged for m in members) or kind == "zst", at  # Arrow writes no checksums


def test_a_disk_that_fails_is_no_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 1000:
                raise OSError(5, "Input/output error")
            return super().read(min(size or 0, 500))

    for pack in PACK.values():
        with pytest.raises(OSError, match="Input/output error"):
            list(scan(Failing(pack(TAR))))


def test_what_is_called_a_tar() -> None:
    for name in ("a/0.tar", "a/0.tar.gz", "a/0.TGZ", "a/0.tar.xz", "a/0.txz", "a/0.tar.zst", "a/0.tar.bz2"):
        assert tar_stem(name) == "a/0"
    for name in ("0.gz", "0.tar.idx", "0.tar.txt", "tar", ".tar", "a/.tgz", "0.tarx", "0.zip"):
        assert tar_stem(name) is None


def test_shards_read_in_place_and_resumed(tmp_path: Path) -> None:
    for name, data in {"0.tar.gz": PACK["gz"](TAR), "1.tar": PACK["xz"](TAR), "2.tgz": TAR}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "3.json").write_bytes(b"{}")
    shards = expand(str(tmp_path))
    assert [shard.name for shard in shards] == ["0", "1", "2"]
    assert [shard.name for shard in expand(f"{tmp_path}/*.tar.gz")] == ["0"]
    for shard in shards:
        reader = RowReader(shard)
        rows = list(reader)
        assert [row.image for row in rows] == list(FILES.values()) and {row.status for row in rows} == {Status.OK}
        path = Path(shard.url)
        assert reader.info["bytes"] == path.stat().st_size
        assert reader.info["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
        made = ShardRecord(shard=shard.name, rows={}, files={}, input=reader.info, fingerprint="", seconds=0)
        assert not InputShard(shard.name, shard.url).is_repaired(made)
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ArtifactMismatch, match="changed"):
            InputShard(shard.name, shard.url).is_repaired(made)
