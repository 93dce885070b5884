"""Tars of any provenance: every entry comes out, damage costs the damaged stretch alone."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from capipe.manifests.files.tar import MAX_HEADER_DATA, Member, TarWriter, scan

from ...conftest import tar_bytes


def scanned(data: bytes, **options: object) -> list[Member]:
    return list(scan(io.BytesIO(data), read_data=True, **options))  # type: ignore[arg-type]


def test_members_and_their_bytes_come_out_in_order() -> None:
    files = {f"{i}.bin": os.urandom(i * 300) for i in range(5)}
    members = scanned(tar_bytes(files))
    assert {m.name: m.data for m in members} == files
    assert all(m.problem is None for m in members)


def test_long_and_unicode_names_of_every_tar_dialect() -> None:
    name = "ein/sehr/" + "langer" * 30 + "/name-ü.jpg"
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        (member,) = scanned(out.getvalue())
        assert (member.name, member.data) == (name, b"abc")


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../b.jpg", "C:\\x.jpg", "./"])
def test_names_that_could_hurt_a_reader_are_problems(name: str) -> None:
    first, second = scanned(tar_bytes([(name, b"x"), ("good.jpg", b"y")]))
    assert first.problem is not None and first.data is None and not first.damaged
    assert second.data == b"y"


NAMES = {
    "macOS screenshot": "Screenshot 9.41.00\u202fAM.jpg",
    "no-break space": "a\xa0b.jpg",
    "ideographic space": "a\u3000b.jpg",
    "emoji joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467.jpg",
    "right to left": "\u202eabc.jpg",
    "soft hyphen": "a\xadb.jpg",
    "private use": "a\ue000b.jpg",
    "tab": "a\tb.jpg",
    "bell": "bad\x07.jpg",
}


@pytest.mark.parametrize("dialect", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_that_is_utf8_is_read(name: str, dialect: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
        for folder in ("", "deep/" * 30):  # a long name has a header of its own
            info = tarfile.TarInfo(folder + name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [(m.name, m.data, m.problem) for m in scanned(out.getvalue())] == [
        (name, b"x", None),
        ("deep/" * 30 + name, b"x", None),
    ]


def test_a_name_that_is_not_utf8_is_a_problem_that_says_so() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.jpg"))
    (member,) = scanned(out.getvalue())
    assert member.problem == "member name 'caf\\\\udce9.jpg' is not UTF-8" and not member.damaged


def test_a_name_with_a_zero_byte_is_a_problem() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"path": "bad\0.jpg"}
        tar.addfile(info)
    (member,) = scanned(out.getvalue())
    assert "has a zero byte" in (member.problem or "")


@pytest.mark.parametrize("dialect", ["gnu", "posix"])
@pytest.mark.parametrize("holes", [1, 60])  # more than a header holds go on in blocks of their own
def test_sparse_members_are_named_and_cost_no_other(tmp_path: Path, dialect: str, holes: int) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        for hole in range(holes):
            file.seek(hole * 65536 * 2)
            file.write(b"x" * 4096)
        file.truncate(holes * 65536 * 2)
    (tmp_path / "b.jpg").write_bytes(b"b")
    command = ["tar", f"--format={dialect}", "--sparse", "--hole-detection=raw", "-cf", "s.tar", "a.jpg", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    first, second = scanned((tmp_path / "s.tar").read_bytes())
    assert first.name == "a.jpg" and "is a sparse member" in (first.problem or "") and not first.damaged
    assert (second.name, second.data) == ("b.jpg", b"b")


def test_links_and_devices_are_problems_and_directories_are_nothing() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "s.jpg"), (tarfile.LNKTYPE, "h.jpg"), (tarfile.FIFOTYPE, "f.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    members = scanned(out.getvalue())
    assert [m.name for m in members] == ["s.jpg", "h.jpg", "f.jpg"]
    assert all("not a file" in (m.problem or "") for m in members)


def test_a_truncated_tar_gives_what_is_whole_and_one_problem() -> None:
    data = tar_bytes({"a.jpg": b"a" * 1000, "b.jpg": b"b" * 1000})
    for cut in range(513, 1536 + 512 + 999, 97):  # anywhere between a's header and the end of b's data
        members = scanned(data[:cut])
        assert members[-1].damaged and members[-1].problem
        whole = [m.name for m in members if m.problem is None]
        assert whole == (["a.jpg"] if cut >= 1536 else [])


def test_a_missing_end_mark_is_reported() -> None:
    data = tar_bytes({"a.jpg": b"a"})
    good, end = scanned(data[:1024])
    assert good.data == b"a" and "end mark" in (end.problem or "")


def test_nonsense_between_members_is_one_problem_and_the_rest_is_read() -> None:
    one, two = tar_bytes({"a.jpg": b"a"})[:1024], tar_bytes({"b.jpg": b"b"})
    noise = random.Random(0).randbytes(512 * 50)
    first, bad, second = scanned(one + noise + two)
    assert (first.data, second.data) == (b"a", b"b")
    assert bad.damaged and bad.size == len(noise)


@pytest.mark.slow
def test_a_million_blocks_of_header_nonsense_cost_one_row() -> None:
    class Nonsense(io.RawIOBase):
        """512 MB of blocks that look like headers and are none, made as they are read."""

        left = 1_000_000 * 512
        block = b"x" * 257 + b"ustar" + b"\xff" * 250

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return (self.block * (size // 512 + 1))[:size]

    members = list(scan(Nonsense(), read_data=True))  # type: ignore[arg-type]
    assert len(members) == 1 and members[0].size == 512_000_000


def test_a_forged_size_does_not_swallow_the_rest() -> None:
    data = bytearray(tar_bytes({"a.jpg": b"a" * 600, "b.jpg": b"b"}))
    info = tarfile.TarInfo("a.jpg")
    info.size = 10**9
    data[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    members = scanned(bytes(data))
    assert "claims 1000000000 bytes" in (members[0].problem or "")
    assert members[-1].data == b"b"


def test_an_absurd_extended_header_is_not_read_into_memory() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, MAX_HEADER_DATA + 1
    members = scanned(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024) + tar_bytes({"b.jpg": b"b"}))
    assert "extended header" in (members[0].problem or "") and members[-1].data == b"b"


def test_concatenated_tars_are_read_through() -> None:
    members = scanned(tar_bytes({"a.jpg": b"a"}) + tar_bytes({"b.jpg": b"b"}))
    assert [m.name for m in members] == ["a.jpg", "b.jpg"]


def test_random_damage_never_raises() -> None:
    rng = random.Random(1)
    clean = tar_bytes({f"{i}.jpg": rng.randbytes(700) for i in range(20)})
    for _ in range(300):
        data = bytearray(clean)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(len(data)) :]
        scanned(bytes(data))


def test_the_digest_covers_every_byte_and_seeking_agrees_with_reading() -> None:
    data = tar_bytes({"a.jpg": b"a" * 5000, "b.jpg": b"b"}) + b"trailing"
    digest = hashlib.sha256()
    read = [(m.name, m.offset, m.size) for m in scan(io.BytesIO(data), read_data=False, digest=digest)]
    sought = [(m.name, m.offset, m.size) for m in scan(io.BytesIO(data))]
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
    assert read == sought


def test_written_tars_are_the_same_bytes_every_time_and_open_everywhere() -> None:
    files = {"000.jpg": b"j" * 513, "000.txt": "ü".encode(), "x" * 150 + ".json": b"{}"}
    outputs = []
    for _ in range(2):
        out = io.BytesIO()
        writer = TarWriter(out)
        for name, data in files.items():
            writer.add(name, data)
        digest = writer.finish()
        assert digest == hashlib.sha256(out.getvalue()).hexdigest()
        outputs.append(out.getvalue())
    assert outputs[0] == outputs[1]
    with tarfile.open(fileobj=io.BytesIO(outputs[0])) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == files  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}


@pytest.mark.parametrize("packed", [False, True])
def test_members_whose_names_are_wanted_are_read_and_others_skipped(packed: bool) -> None:
    """Everything but the bytes of the others is as in a full reading; also where nothing can be skipped by seeking."""
    files = [(f"{i}.{kind}", os.urandom(i * 300)) for i in range(5) for kind in ("bin", "txt")]
    whole_tar = tar_bytes([*files, ("../up.bin", b"x"), ("cut.bin", b"c" * 3000)])
    data = whole_tar[: whole_tar.rindex(b"c") - 500]
    stored = gzip.compress(data) if packed else data
    whole = list(scan(io.BytesIO(stored), read_data=True))
    some = list(scan(io.BytesIO(stored), read_data=lambda name: name.endswith(".bin")))
    wanted = [replace(member, data=member.data if member.name.endswith(".bin") else None) for member in whole]
    assert some == wanted and sum(member.data is not None for member in some) == 5
