"""Artifacts in a bucket: who may write, what counts, how much is asked of the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests import artifact as artifact_module
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.object_store.log import COPY, MANY, OBJECTS
from capipe.manifests.schema import INGEST
from capipe.manifests.sharing import owners
from capipe.manifests.sharing.claims import ClaimLost
from capipe.manifests.sharing.output_lock import OutputLock
from capipe.manifests.sharing.owners import LEASE_SECONDS, OWNERS, Owner
from capipe.manifests.verify import verify

from ...storing import StoreProxy

SEMANTIC = {"model": "m"}


def opened(url: str, **options: Any) -> Artifact:
    return Artifact.create(url, "test", SEMANTIC, {"shards_total": 2}, **options)


def row(key: str) -> dict[str, Any]:
    return {**dict.fromkeys(INGEST.names), "key": key, "uid": (key * 32)[:32], "status": "ok"}


def commit(artifact: Artifact, shard: str = "00000", keys: str = "ab", **options: Any) -> ShardRecord:
    with artifact.begin(shard, INGEST, **options) as transaction:
        for key in keys:
            transaction.write(row(shard + key))
        return transaction.commit(rows_in=len(keys), input_info={"digest": "d"})


def objects(url: str, part: str = "") -> list[str]:
    folder = Folder(url)
    names = (path.removeprefix(f"{folder.path}/") for path in folder.fs.find(folder.path))
    return sorted(name for name in names if part in name)


def test_the_slower_of_two_writers_overwrites_nothing(s3: str, tmp_path: Path, monkeypatch: Any) -> None:
    """It has other bytes (a server's samples), and ends last: its own are dropped, and it is told what stands."""
    url = f"{s3}/{tmp_path.name}"
    quick, slow = opened(url, share=True), opened(url, share=True)
    with slow.begin("00000", INGEST) as late:
        late.write(row("late"))
        monkeypatch.setenv("CAPIPE_CACHE", str(tmp_path / "another machine"))
        first = commit(quick)
        assert late.commit(rows_in=1, input_info={"digest": "d"}) == first
    assert Artifact.open(url).committed() == {"00000": first} and verify(url).faults == []
    assert objects(url, "attempts") == []
    quick.close()
    slow.close()


def test_a_dead_attempts_files_are_replaced_and_equal_ones_serve(store: StoreProxy, s3: str, tmp_path: Path) -> None:
    url = f"{s3}/{tmp_path.name}"
    store.fate = lambda method, path, headers: 403 if method == "PUT" and "manifest.d/" in path else None
    artifact = opened(url)
    with pytest.raises(PermissionError) as denied:  # as if killed before its commit
        commit(artifact)
    assert str(denied.value.filename).startswith(f"{url}/{OBJECTS}/00000.json")
    store.fate = lambda method, path, headers: None
    before = {name: Folder(url).read_bytes(name) for name in ("00000.parquet", "00000_stats.json")}
    store.requests.clear()
    record = commit(artifact)
    assert not store.count("PUT", "_capipe/attempts") and verify(url).faults == []
    assert all(Folder(url).read_bytes(name) == data for name, data in before.items())
    artifact.close()
    other = opened(url, fresh=True)
    Folder(url).fs.write(b"of a dead attempt", Folder(url).full("00000.parquet"))
    assert commit(other).files == record.files and verify(url).faults == [] and objects(url, "attempts") == []
    other.close()


def test_a_run_from_before_fresh_counts_no_more(s3: str, tmp_path: Path) -> None:
    """It was stopped for long enough to be thought dead; its card is gone, and it goes on."""
    url = f"{s3}/{tmp_path.name}"
    zombie = opened(url)
    commit(zombie, "00001")
    assert zombie._lock is not None and zombie._lock.presence is not None
    zombie._lock.close()
    fresh = opened(url, fresh=True)
    late = commit(zombie, "00000", keys="xyz")
    assert late.count == 3 and fresh.committed() == {}
    with pytest.raises(ArtifactMismatch, match="another run has started over here"):
        zombie.note(shards_total=7)
    record = commit(fresh, "00000")
    assert Artifact.open(url).committed() == {"00000": record} and record.count == 2
    assert verify(url).faults == []
    fresh.close()


def test_an_answer_that_was_lost_is_no_other_writer(
    store: StoreProxy, s3: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The object was created, and the connection broke before the answer: the second try finds its own."""
    monkeypatch.setenv("CAPIPE_STORE_PATIENCE", "20")
    url = f"{s3}/{tmp_path.name}"
    artifact = opened(url, share=True)
    lost: set[str] = set()

    def fate(method: str, path: str, headers: Any) -> str | None:
        if method != "PUT" or path in lost:
            return None
        lost.add(path)
        return "lost"

    store.fate = fate
    assert artifact.claims is not None
    token = artifact.claims.take("00000")
    assert token is not None
    record = commit(artifact, claim=token)
    store.fate = lambda method, path, headers: None
    assert len(lost) == 4 and artifact.committed() == {"00000": record} and verify(url).faults == []
    artifact.close()


def test_a_store_without_conditional_creation_is_refused(store: StoreProxy, s3: str, tmp_path: Path) -> None:
    store.conditional = False
    with pytest.raises(BadInput, match="--share needs a file system with locks, or a store with conditional creation"):
        opened(f"{s3}/{tmp_path.name}", share=True)
    assert objects(f"{s3}/{tmp_path.name}") == []
    artifact = opened(f"{s3}/{tmp_path.name}")  # one run alone can do without
    record = commit(artifact)
    artifact.retract(record)
    again = commit(artifact, keys="abc")
    artifact.close()
    assert Artifact.open(artifact.url).committed() == {"00000": again} and verify(artifact.url).faults == []
    store.fate = lambda method, path, headers: 501 if headers.get("If-None-Match") else None
    with pytest.raises(BadInput, match="conditional creation"):
        opened(f"{s3}/{tmp_path.name}", share=True)


def test_a_bucket_is_never_created(s3: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"s3://bukket/out: there is no bucket 'bukket'; check its name"):
        opened("s3://bukket/out")
    assert not Folder("s3://bukket/out").fs.exists("bukket")


def test_one_place_by_two_schemes_is_one_place(s3: str, tmp_path: Path) -> None:
    url = f"{s3}/{tmp_path.name}"
    first = opened(url)
    with pytest.raises(BadInput, match="another capipe process is writing here"):
        opened(url.replace("s3:", "s3a:"))
    assert Folder(url).private("x") == Folder(url.replace("s3:", "s3a:")).private("x")
    first.close()


def elsewhere(url: str, run: str = "0123456789abcdef", shares: bool = True) -> None:
    """The card of a run on another machine, whose heart beats now."""
    card = {"run": run, "host": "far", "pid": 1, "machine": "another boot", "born": "1", "shares": shares}
    Folder(url).write(f"_capipe/{OWNERS}/{run}.json", json.dumps(card).encode())


def test_runs_on_other_machines_are_known_by_their_heartbeat(s3: str, tmp_path: Path, monkeypatch: Any) -> None:
    url = f"{s3}/{tmp_path.name}"
    opened(url).close()
    elsewhere(url)
    with pytest.raises(BadInput, match=r"another capipe process is writing here \(process 1 on far"):
        opened(url)
    opened(url, share=True).close()
    elsewhere(url, shares=False)
    with pytest.raises(BadInput, match="process 1 on far"):
        opened(url, share=True)
    monkeypatch.setattr(owners, "LEASE_SECONDS", 0.5)
    time.sleep(2)  # a store's stamps are whole seconds
    opened(url).close()
    assert objects(url, OWNERS) == []


def test_no_clock_of_a_machine_decides(s3: str, tmp_path: Path, monkeypatch: Any) -> None:
    """This machine's clock is a day ahead: the other's claim is no older for it."""
    url = f"{s3}/{tmp_path.name}"
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86400)
    artifact = opened(url, share=True)
    elsewhere(url)
    claim = {"token": "0123456789abcdef-0", "run": "0123456789abcdef"}
    Folder(url).write("_capipe/claims/00000.json", json.dumps(claim).encode())
    assert artifact.claims is not None and artifact.claims.take("00000") is None
    assert str(artifact.claims.holder("00000")) == "process 1 on far"
    monkeypatch.setattr(owners, "LEASE_SECONDS", -3600.0)  # the store's own clock is wrong: work is done twice at most
    token = artifact.claims.take("00000")
    assert token is not None
    record = commit(artifact, claim=token)
    artifact.close()
    assert Artifact.open(url).committed() == {"00000": record} and LEASE_SECONDS == 60


def test_claims_in_a_store(s3: str, tmp_path: Path) -> None:
    url = f"{s3}/{tmp_path.name}"
    one, other = opened(url, share=True), opened(url, share=True)
    assert one.claims is not None and other.claims is not None
    first = one.claims.take("00000")
    assert first is not None and other.claims.take("00000") is None and other.claims.take("00001") is not None
    assert other.claims.holder("00000") == one.claims.owner
    one.claims.release("00000")
    assert other.claims.take("00000") is not None
    with pytest.raises(ClaimLost):
        commit(one, claim=first)
    other.close()
    assert one.claims.take("00001") is not None
    one.close()
    assert objects(url, "claims") == objects(url, OWNERS) == []


def test_the_claim_of_a_killed_process_is_taken_at_once(store: StoreProxy, s3: str, tmp_path: Path) -> None:
    url = f"{s3}/{tmp_path.name}"
    code = (
        "import signal; from capipe.manifests.artifact import Artifact\n"
        f"artifact = Artifact.create({url!r}, 'test', {SEMANTIC!r}, {{}}, share=True)\n"
        "print(artifact.claims.take('00000'), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().strip() != "None"
        mine = opened(url, share=True)
        assert mine.claims is not None and mine.claims.take("00000") is None
        process.kill()
    assert mine.claims.take("00000") is not None
    mine.close()


def test_a_manifest_is_listed_once_and_its_entries_are_read_once(store: StoreProxy, s3: str, tmp_path: Path) -> None:
    url, count = f"{s3}/{tmp_path.name}", MANY + 6
    artifact = opened(url)
    for number in range(count):
        commit(artifact, f"{number:05d}", "a")
    artifact.close()
    store.requests.clear()
    artifact = opened(url)  # reads them, and leaves a copy for the next
    assert len(artifact.committed()) == count == len(artifact.committed())
    assert store.count("GET", OBJECTS + "/") == count and store.count("GET", f"prefix={tmp_path.name}/{OBJECTS}/") <= 5
    commit(artifact, "99999", "a")
    store.requests.clear()
    assert len(artifact.committed()) == count + 1
    assert [path for method, path in store.requests if method == "GET" and f"{OBJECTS}/" in path] == [
        f"/bucket/{tmp_path.name}/{OBJECTS}/99999.json"
    ]
    artifact.close()
    store.requests.clear()
    reader = Artifact.open(url)
    assert len(reader.committed()) == count + 1 == len(reader.seconds())
    assert store.count("GET", OBJECTS + "/") <= 2 and store.count("GET", COPY) == 1
    Folder(url).write(COPY, b'{"name": "00000.json", "mark": "x", "data": "{}"}\nnonsense')
    assert Artifact.open(url).committed() == reader.committed()


def test_unfinished_uploads_of_the_same_place_are_aborted(s3: str, tmp_path: Path) -> None:
    url, fs = f"{s3}/{tmp_path.name}", Folder(s3).fs
    client = fs._fs
    for key in (f"{tmp_path.name}/00000.tar", f"{tmp_path.name}-other/00000.tar"):
        client.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    assert len(list(fs.unfinished_uploads(f"bucket/{tmp_path.name}"))) == 1
    opened(url).close()
    assert list(fs.unfinished_uploads(f"bucket/{tmp_path.name}")) == []
    assert len(list(fs.unfinished_uploads(f"bucket/{tmp_path.name}-other"))) == 1


def test_an_upload_of_a_living_run_is_left_alone(s3: str, tmp_path: Path) -> None:
    url, fs = f"{s3}/{tmp_path.name}", Folder(s3).fs
    first = opened(url, share=True)
    fs._fs.call_s3("create_multipart_upload", Bucket="bucket", Key=f"{tmp_path.name}/00000.tar")
    second = opened(url, share=True)
    assert len(list(fs.unfinished_uploads(f"bucket/{tmp_path.name}"))) == 1
    first.close()
    assert len(list(fs.unfinished_uploads(f"bucket/{tmp_path.name}"))) == 1
    second.close()
    assert list(fs.unfinished_uploads(f"bucket/{tmp_path.name}")) == []


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("00000.json", b"{}\n", "not a manifest line"),
        ("strange", b"{}\n", "its name is no shard's"),
        ("00000.json", b'{}\n{"attempt": "../x", "objects": {"a": "b"}}\n', "its attempt is no id"),
        (
            "00000.json",
            b'{}\n{"attempt": "' + b"0" * 32 + b'", "objects": {"../a": "_capipe/attempts/x"}}\n',
            "climbs out of its folder",
        ),
        (
            "00000.json",
            b'{}\n{"attempt": "' + b"0" * 32 + b'", "objects": {"00000.tar": "other/x.tar"}}\n',
            "outside _capipe/attempts",
        ),
        ("00000.json", b'{}\n{"generation": 3}\n', "of another type"),
    ],
)
def test_forged_entries_are_refused(s3: str, tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    url = f"{s3}/{tmp_path.name}"
    opened(url).close()
    Folder(url).write(f"{OBJECTS}/{name}", data)
    with pytest.raises(ArtifactMismatch, match=reason) as refused:
        Artifact.open(url).committed()
    assert "\n" not in str(refused.value)
    with pytest.raises(ArtifactMismatch, match=reason):
        artifact = opened(url)
        try:
            artifact.committed()
        finally:
            artifact.close()


def test_an_artifact_from_before_notes_is_read_and_gone_on_with(s3: str, tmp_path: Path) -> None:
    """One object for a shard, without a note; its times beside it."""
    url = f"{s3}/{tmp_path.name}"
    artifact = opened(url)
    record = commit(artifact)
    artifact.close()
    folder = Folder(url)
    line = folder.read_bytes(f"{OBJECTS}/00000.json").split(b"\n")[0]
    folder.write(f"{OBJECTS}/00000.json", line)
    folder.write("_capipe/times.d/shards/00000.json", b'{"shard": "00000", "seconds": 2.5}')
    artifact = opened(url)
    assert artifact.committed() == {"00000": record} and artifact.seconds() == {"00000": 2.5}
    artifact.retract(record)
    again = commit(artifact, keys="abc")
    artifact.close()
    assert again.replaces == record.current and Artifact.open(url).committed() == {"00000": again}
    assert verify(url).faults == [] and os.environ["AWS_ENDPOINT_URL"]


def test_a_range_is_read_by_one_request(store: StoreProxy, s3: str, tmp_path: Path) -> None:
    """A training run reads single images from tars."""
    folder = Folder(f"{s3}/{tmp_path.name}")
    folder.write("file", bytes(range(100)))
    store.requests.clear()
    assert folder.fs.read(folder.full("file"), 10, 13) == bytes([10, 11, 12])
    assert folder.fs.read(folder.full("file")) == bytes(range(100)) and len(store.requests) == 2


def test_of_two_runs_that_end_at_once_one_is_the_last(s3: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Both look, see the other, and leave: on two machines no guard orders them. What the last one is to do is then
    done."""
    monkeypatch.setattr(artifact_module, "threshold", lambda *_: nullcontext())
    url = f"{s3}/{tmp_path.name}"
    runs = [opened(url, share=True) for _ in range(2)]
    met, ended = threading.Barrier(2), list[bool]()
    look = OutputLock._others

    def others(lock: OutputLock) -> list[Owner]:
        found = look(lock)
        met.wait(20)
        return found

    monkeypatch.setattr(OutputLock, "_others", others)
    threads = [threading.Thread(target=lambda run=run: ended.append(run.close())) for run in runs]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 2 and any(ended) and objects(url, OWNERS) == []
