"""Manifests of many shards: what is read, and what of it is looked at again; fast checks beside their slow twins."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests import manifest
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.names import name_problem, unusual_name_problem
from capipe.manifests.files.storage import Folder
from capipe.manifests.fingerprint import canonical
from capipe.manifests.manifest import CHECKSUM, LINES, Manifest, ShardRecord


def record(number: int, **stats: object) -> ShardRecord:
    shard = f"{number:05d}"
    files = {f"{shard}.parquet": {"bytes": number, "sha256": f"{number:064x}"}}
    return ShardRecord(shard, {"ok": number}, files, {"digest": "d"}, "f", stats=stats)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    Artifact.create(str(tmp_path), "test", {}, {}).close()
    return tmp_path


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that were parsed."""
    seen: list[bytes] = []
    plain = manifest.parsed

    def parsed(line: bytes) -> ShardRecord:
        seen.append(line)
        return plain(line)

    monkeypatch.setattr(manifest, "parsed", parsed)
    return seen


def append(out: Path, *records: ShardRecord) -> None:
    with (out / LINES).open("ab") as file:
        file.writelines(manifest.written(each) + b"\n" for each in records)


def test_every_line_is_parsed_once_however_many_ask(out: Path, lines: list[bytes]) -> None:
    append(out, *map(record, range(40)))
    first, second = Manifest(Folder(str(out))), Manifest(Folder(str(out)))
    assert len(first.committed()) == len(second.committed()) == len(second.news()) == 40
    assert first.find("00007") == record(7) and first.find("none") is None
    assert len(lines) == 40
    append(out, record(40), record(41))
    assert [each.shard for each in second.news()] == ["00040", "00041"] and second.news() == []
    assert len(first.news()) == 42 and len(lines) == 42


def test_a_manifest_that_was_rewritten_is_read_anew(out: Path) -> None:
    """Also in place, and longer than before, as an editor writes it."""
    append(out, *map(record, range(3)))
    read = Manifest(Folder(str(out)))
    assert len(read.committed()) == 3
    with (out / LINES).open("r+b") as file:
        file.writelines(manifest.written(record(number)) + b"\n" for number in range(10, 16))
    assert list(read.committed()) == [f"{number:05d}" for number in range(10, 16)]
    assert len(read.news()) == 6


def test_what_a_caller_does_to_its_records_stays_with_it(out: Path) -> None:
    append(out, record(1), record(2))
    read = Manifest(Folder(str(out)))
    read.committed().clear()
    assert len(read.committed()) == 2


def test_the_latest_are_those_committed_last_and_still_there(out: Path) -> None:
    append(out, *map(record, range(6)), record(4).retraction(), record(0, again=1))
    read = Manifest(Folder(str(out)))
    assert read.latest(3) == [record(3), record(5), record(0, again=1)]
    assert len(read.latest(100)) == 5


def test_a_line_as_it_was_written_is_known_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow twin writes the values again."""
    records = [record(1), record(2, text='ü\udc80 \\ "x"', deep={"a": [1.5, None]}), record(3).retraction()]
    slow: list[object] = []
    plain = manifest._checksum
    written = [manifest.written(each) for each in records]
    monkeypatch.setattr(manifest, "_checksum", lambda entry: slow.append(entry) or plain(entry))
    assert [manifest.parsed(line).shard for line in written] == ["00001", "00002", "00003"] and slow == []
    for line in written:
        entry = json.loads(line)
        assert entry.pop(CHECKSUM) == plain(entry)
        spaced = json.dumps({**entry, CHECKSUM: plain(entry)}).encode()  # the same values in other bytes
        assert manifest.parsed(spaced).shard == entry["shard"]
        with pytest.raises(ValueError, match="checksum"):
            manifest.parsed(line.replace(b'"f"', b'"g"'))
    assert slow


def test_numbers_that_json_lacks_are_no_line_of_ours() -> None:
    body = manifest.written(record(1, x=1.5)).replace(b"1.5", b"NaN").partition(b",")[2]
    short = hashlib.sha256(b"{" + body).hexdigest()[:16]
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest.parsed(f'{{"{CHECKSUM}":"{short}",'.encode() + body)


def test_a_damaged_line_is_named_and_names_the_fix(out: Path) -> None:
    append(out, record(1), record(2))
    data = (out / LINES).read_bytes()
    (out / LINES).write_bytes(data.replace(b'"bytes":2', b'"bytes":3'))
    with pytest.raises(ArtifactMismatch, match=r"manifest\.jsonl:2: not a manifest line .* Restore it"):
        Manifest(Folder(str(out))).committed()


def test_the_digest_is_that_of_the_records_as_one_list() -> None:
    records = [record(1, deep={"a": [1]}), replace(record(2), seconds=3.5)]
    whole = canonical([asdict(replace(each, seconds=None)) for each in records])
    assert manifest.digest_of(records) == hashlib.sha256(whole.encode()).hexdigest()
    assert manifest.digest_of([]) == hashlib.sha256(b"[]").hexdigest()


def test_a_name_that_is_surely_sound_has_no_problem_by_any_rule() -> None:
    pick = random.Random(0)
    alphabet = "ab0.-_~/\\: \x00é"
    names = {"".join(pick.choices(alphabet, k=pick.randrange(1, 9))) for _ in range(20_000)}
    names |= {"a/../b", "..", ".a", "a.", "C:", "a//b", "a" * 201, "a/b/c/d/e", "00000.parquet\n"}
    assert [name for name in names if name_problem(name) != unusual_name_problem(name)] == []
    assert sum(name_problem(name) is None for name in names) > 100
