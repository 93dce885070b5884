"""Claims: one shard, one worker, whatever dies or only seems to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.locks import LockHeld, Patience
from capipe.manifests.files.storage import Folder
from capipe.manifests.journal import Journal
from capipe.manifests.manifest import LINES, Manifest
from capipe.manifests.schema import INGEST
from capipe.manifests.sharing import claims as claims_module
from capipe.manifests.sharing import owners
from capipe.manifests.sharing.claims import ClaimLost, Claims, alone
from capipe.manifests.sharing.owners import LEASE_SECONDS, living
from capipe.manifests.verify import verify

SEMANTIC = {"model": "m"}


def shared(out: Path, **options: Any) -> Artifact:
    return Artifact.create(str(out), "test", SEMANTIC, {"shards_total": 2}, share=True, **options)


def row(key: str) -> dict[str, Any]:
    return {**dict.fromkeys(INGEST.names), "key": key, "uid": (key * 32)[:32], "status": "ok"}


def commit(artifact: Artifact, shard: str, token: str | None, keys: str = "ab") -> None:
    with artifact.begin(shard, INGEST, claim=token) as transaction:
        for key in keys:
            transaction.write(row(shard + key))
        transaction.commit(rows_in=len(keys), input_info={"digest": "d"})


def abroad(out: Path, run: str = "0123456789abcdef", age: float = 0.0, shard: str = "00000") -> None:
    """A claim of a run on another machine, whose heart beat last so many seconds ago."""
    private = out / "_capipe"
    card = private / f"owners/{run}.json"
    for path in (card, private / f"claims/{shard}.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps({"run": run, "host": "far", "pid": 1, "machine": "another boot", "born": "1"}))
    os.utime(card, (time.time() - age, time.time() - age))
    (private / f"claims/{shard}.json").write_text(json.dumps({"token": f"{run}-0", "run": run}))


def test_a_shard_is_claimed_once(tmp_path: Path) -> None:
    one, other = Claims(Folder(str(tmp_path))), Claims(Folder(str(tmp_path)))
    first = one.take("00000")
    assert first is not None and other.take("00000") is None and other.take("00001") is not None
    assert other.holder("00000") == one.owner
    one.release("00000")
    second = other.take("00000")
    assert second not in (None, first)
    one.release("00000")  # not its own any more
    assert one.take("00000") is None
    other.close()
    assert one.take("00000") is not None
    one.close()
    assert not list((tmp_path / "_capipe/claims").iterdir()) and not list((tmp_path / "_capipe/owners").iterdir())


def test_a_claim_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    code = (
        "import signal; from capipe.manifests.sharing.claims import *\n"
        f"folder = Folder({str(tmp_path)!r}); token = Claims(folder).take('00000')\n"
        "folder.private(scratch_of(Claim('00000', token))).mkdir(parents=True)\n"
        "print(token, flush=True); signal.pause()"
    )
    mine = Claims(Folder(str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        scratch = tmp_path / "_capipe/tmp" / other.stdout.readline().strip()
        assert mine.take("00000") is None and len(living(Folder(str(tmp_path)))) == 2
        other.kill()
    assert scratch.is_dir() and mine.take("00000") is not None
    assert not scratch.exists() and living(Folder(str(tmp_path))) == [mine.owner]
    mine.close()


def test_a_claim_of_another_machine_ends_with_its_lease(tmp_path: Path) -> None:
    mine = Claims(Folder(str(tmp_path)))
    abroad(tmp_path, age=LEASE_SECONDS - 20)
    assert mine.take("00000") is None
    abroad(tmp_path, age=LEASE_SECONDS + 20)
    assert mine.take("00000") is not None
    mine.close()


def test_a_claim_cut_short_is_nobodys(tmp_path: Path) -> None:
    mine = Claims(Folder(str(tmp_path)))
    (tmp_path / "_capipe/claims/00000.json").write_text('{"token": "x')
    assert mine.take("00000") is not None
    mine.close()


def test_a_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "BEAT_SECONDS", 0.05)
    mine, other = Claims(Folder(str(tmp_path))), Claims(Folder(str(tmp_path)))
    card = tmp_path / f"_capipe/owners/{mine.owner.run}.json"
    assert mine.take("00000") is not None
    for spoil in (lambda: os.utime(card, (1, 1)), card.unlink):
        spoil()
        deadline = time.monotonic() + 20
        while (not card.exists() or card.stat().st_mtime < 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert other.take("00000") is None
    mine.close()
    other.close()


def test_one_of_many_threads_takes_over(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    takers = [Claims(folder) for _ in range(6)]
    for number in range(20):
        shard = f"{number:05d}"
        abroad(tmp_path, age=2 * LEASE_SECONDS, shard=shard)
        start, won = threading.Barrier(len(takers)), []

        def take(taker: Claims, shard: str = shard, start: threading.Barrier = start, won: list[Any] = won) -> None:
            start.wait()
            won.append(taker.take(shard))

        threads = [threading.Thread(target=take, args=(taker,)) for taker in takers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 6 and len([token for token in won if token]) == 1
    for taker in takers:
        taker.close()


def take_and_commit(out: str, names: list[str]) -> list[str]:
    """In a process of its own: claim every shard, commit those that could be."""
    artifact = shared(Path(out))
    assert artifact.claims is not None
    done = []
    for name in names:
        token = artifact.claims.take(name)
        if token is not None and name not in artifact.committed():
            commit(artifact, name, token)
            done.append(name)
        artifact.claims.release(name)
    artifact.close()
    return done


def test_processes_share_shards_and_the_manifest(tmp_path: Path) -> None:
    names = [f"{number:05d}" for number in range(30)]
    first = shared(tmp_path)
    for name in names[::3]:
        abroad(tmp_path, age=2 * LEASE_SECONDS, shard=name)  # left by a dead job
    tail = Manifest(first.folder)
    with ProcessPoolExecutor(
        3, get_context("fork")
    ) as pool:  # spawned ones would import this file by its folder's name
        parts = list(pool.map(take_and_commit, [str(tmp_path)] * 3, [names, names[::-1], names[10:] + names[:10]]))
    assert sorted(name for part in parts for name in part) == names  # each once
    assert sorted(record.shard for record in tail.news()) == names and tail.news() == []
    assert (tmp_path / LINES).read_bytes().count(b"\n") == 30
    assert verify(str(tmp_path)).faults == []
    first.close()
    assert sorted(path.name for path in (tmp_path / "_capipe").iterdir()) == [
        "config.json",
        "guard",
        "lock",
        "manifest.jsonl",
        "times.jsonl",
    ]


def test_a_slow_worker_that_lost_its_shard_commits_nothing(tmp_path: Path) -> None:
    slow, quick = shared(tmp_path), shared(tmp_path)
    assert slow.claims is not None and quick.claims is not None
    token = slow.claims.take("00000")
    with slow.begin("00000", INGEST, claim=token) as transaction:
        transaction.write(row("a"))
        card = tmp_path / f"_capipe/owners/{slow.claims.owner.run}.json"
        os.utime(card, (1, 1))  # as of a process that was stopped for long
        other = quick.claims.take("00000")
        assert other is not None
        with pytest.raises(ClaimLost, match="00000 was given to another worker"):
            transaction.commit(rows_in=1, input_info={"digest": "d"})
        assert quick.committed() == {} and not list(tmp_path.glob("*.parquet"))
    commit(quick, "00000", other, "xyz")
    slow.claims.release("00000")
    assert quick.committed()["00000"].count == 3 and len((tmp_path / LINES).read_text().splitlines()) == 1
    with slow.begin("00000", INGEST, claim=token) as late, pytest.raises(ClaimLost):
        late.write(row("a"))
        late.commit(rows_in=1, input_info={"digest": "d"})
    quick.close()
    slow.close()
    assert verify(str(tmp_path)).faults == [] and not (tmp_path / "_capipe/tmp").exists()


def test_an_exclusive_writer_and_sharing_ones_refuse_each_other(tmp_path: Path) -> None:
    first = shared(tmp_path)
    scratch = tmp_path / "_capipe/tmp/of-the-first"
    scratch.mkdir(parents=True)
    second = shared(tmp_path)
    assert scratch.is_dir()  # another live process's
    with pytest.raises(BadInput, match=r"another capipe process is writing here \(process \d+ on .*--share"):
        Artifact.create(str(tmp_path), "test", SEMANTIC, {})
    with pytest.raises(ArtifactMismatch):
        Artifact.create(str(tmp_path), "test", {"model": "n"}, {}, share=True)
    first.close()
    second.close()
    alone = Artifact.create(str(tmp_path), "test", SEMANTIC, {"shards_total": 2})
    assert not scratch.exists()
    with pytest.raises(BadInput, match="another capipe process"):
        shared(tmp_path)
    alone.close()


def test_a_run_on_a_machine_that_locks_do_not_reach_is_known_by_its_beat(tmp_path: Path) -> None:
    shared(tmp_path).close()
    abroad(tmp_path, age=1)
    with pytest.raises(BadInput, match="process 1 on far"):
        Artifact.create(str(tmp_path), "test", SEMANTIC, {})
    joined = shared(tmp_path)
    assert (tmp_path / "_capipe/claims/00000.json").exists()
    joined.close()
    abroad(tmp_path, age=2 * LEASE_SECONDS)
    Artifact.create(str(tmp_path), "test", SEMANTIC, {"shards_total": 2}).close()
    assert not (tmp_path / "_capipe/claims").exists()


def test_only_the_first_of_those_that_share_releases_the_quarantine(tmp_path: Path) -> None:
    first = shared(tmp_path)
    first.quarantine("00000", "broken")
    second = shared(tmp_path)
    assert second.quarantined() == {"00000": "broken"}
    first.close()
    second.close()
    third = shared(tmp_path)
    assert third.quarantined() == {}
    third.close()


def test_the_last_process_drops_the_journal_of_one_that_was_killed_after_its_commit(tmp_path: Path) -> None:
    """A journal is deleted right after the commit of its shard; the other process is at work by then."""
    code = (
        "import signal; from capipe.manifests.artifact import Artifact; from capipe.manifests.schema import INGEST\n"
        f"artifact = Artifact.create({str(tmp_path)!r}, 'test', {SEMANTIC!r}, {{}}, share=True)\n"
        "for shard in ('00000', '00001'): artifact.journal(shard).close()\n"
        "with artifact.begin('00000', INGEST) as shard: shard.commit(rows_in=0, input_info={'digest': 'd'})\n"
        "print('committed', flush=True); signal.pause()"
    )
    last = shared(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "committed\n"
        other.kill()
    last.close()
    assert [path.name for path in (tmp_path / "_capipe/journal").iterdir()] == ["00001.jsonl"]


def test_a_file_system_that_others_do_not_see_is_not_shared() -> None:
    with pytest.raises(BadInput, match="--share needs a file system with locks, or a store with conditional creation"):
        Artifact.create("memory://shared", "test", SEMANTIC, {}, share=True)


def test_a_journal_changes_hands_while_its_first_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    slow = Journal(path, "f")
    slow.append(0, row("a"))
    quick = Journal(path, "f")
    assert sorted(quick.rows) == [0]
    slow.append(1, row("b"))  # thought dead, and writing still
    quick.append(2, row("c"))
    slow.append(3, row("d"))
    quick.close()
    slow.close()
    assert sorted(Journal(path, "f").rows) == [0, 2]
    assert [each.name for each in tmp_path.iterdir()] == ["j.jsonl"]


def test_on_an_object_store_claims_fence_a_runs_own_workers(s3: str) -> None:
    artifact = Artifact.create(f"{s3}/fenced", "test", SEMANTIC, {"shards_total": 1})
    claims = artifact.fence()
    lost = claims.take("00000")
    claims.release("00000")  # its worker was thought dead
    again = claims.take("00000")
    with pytest.raises(ClaimLost):
        commit(artifact, "00000", lost)
    assert artifact.committed() == {}
    commit(artifact, "00000", again)
    artifact.close()
    assert verify(f"{s3}/fenced").faults == [] and artifact.folder.names("_capipe/claims") == []


def test_one_at_a_time_does_what_is_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "NOTICE_SECONDS", 0.0)
    mine, other = Claims(Folder(str(tmp_path))), Claims(Folder(str(tmp_path)))
    said: list[str] = []
    with alone(mine, "extras"):
        with alone(other, "another"):
            pass
        with pytest.raises(LockHeld), alone(other, "extras", Patience(seconds=0.7, say=said.append)):
            pass
        with pytest.raises(LockHeld), alone(other, "extras", Patience(stopped=lambda: True)):
            pass
    assert len(said) == 1 and f"waiting for {mine.owner}" in said[0]
    with alone(other, "extras"), alone(None, "extras"):
        assert mine.take("extras") is None
    mine.close()
    other.close()
