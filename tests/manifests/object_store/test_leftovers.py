"""What runs leave in a store, and who removes it: never anything of a run that lives, or of a commit that stands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.manifests.object_store import commits
from capipe.manifests.object_store.log import ATTEMPTS, OBJECTS
from capipe.manifests.sharing.claims import CLAIMS
from capipe.manifests.sharing.output_lock import OutputLock
from capipe.manifests.sharing.owners import OWNERS, Owner
from capipe.manifests.verify import verify

from .test_artifacts import commit, objects, opened


class Newcomer:
    """A run on another machine that begins, and claims a shard, right after another one looked for others."""

    def __init__(self, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run: Artifact | None = None
        look = OutputLock._others

        def others(lock: OutputLock) -> list[Owner]:
            found = look(lock)
            if self.run is None:
                monkeypatch.setattr(OutputLock, "_others", look)
                monkeypatch.setenv("CAPIPE_CACHE", str(cache))
                self.run = opened(url, share=True)
                self.begin_a_commit(url)
            return found

        monkeypatch.setattr(OutputLock, "_others", others)

    def begin_a_commit(self, url: str) -> None:
        assert self.run is not None and self.run.claims is not None and self.run.claims.take("00000")
        Folder(url).write(f"{ATTEMPTS}/{'0' * 32}/00000.parquet", b"aside")
        bucket, _, folder = Folder(url).path.partition("/")
        client: Any = Folder(url).fs._fs
        client.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{folder}/00000.tar")

    def is_untouched(self, url: str) -> bool:
        assert self.run is not None
        uploads = list(Folder(url).fs.unfinished_uploads(Folder(url).path))
        own = f"{OWNERS}/{self.run.claims.owner.run}" if self.run.claims else "?"
        return all([objects(url, own), objects(url, f"{CLAIMS}/00000"), objects(url, ATTEMPTS), uploads])


def test_a_run_that_begins_while_another_one_begins_keeps_what_is_its_own(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/{tmp_path.name}"
    newcomer = Newcomer(url, tmp_path / "another machine", monkeypatch)
    first = opened(url, share=True)
    assert newcomer.is_untouched(url) and first._lock is not None and first._lock.alone
    first.close()
    assert newcomer.is_untouched(url)


def test_a_run_that_begins_while_the_last_one_ends_keeps_what_is_its_own(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/{tmp_path.name}"
    first = opened(url, share=True)
    newcomer = Newcomer(url, tmp_path / "another machine", monkeypatch)
    first.close()
    assert newcomer.is_untouched(url)


def after_decision(monkeypatch: pytest.MonkeyPatch, action: Callable[[Folder], None]) -> None:
    """Have an action follow the creation of a shard's entry."""
    decide = commits._decide

    def decided(folder: Folder, *rest: Any) -> Any:
        entry = decide(folder, *rest)
        action(folder)
        return entry

    monkeypatch.setattr(commits, "_decide", decided)


def test_a_run_killed_right_after_its_decision_has_committed(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finds the files aside, although it removes what dead runs left."""
    url = f"{s3}/{tmp_path.name}"

    def killed(folder: Folder) -> None:
        raise KeyboardInterrupt

    first = opened(url)
    Folder(url).write("00000.parquet", b"of a dead attempt")
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        after_decision(once, killed)
        commit(first)
    assert objects(url, ATTEMPTS) and first.committed() == {} and first._lock is not None
    first._lock.close()
    second = opened(url)
    assert list(second.committed()) == ["00000"] and verify(url).faults == [] and objects(url, ATTEMPTS) == []
    second.close()


def test_a_run_taken_for_dead_in_its_commit_brings_its_files_again(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept longer than its lease before its decision; what it had aside was cleared."""
    url = f"{s3}/{tmp_path.name}"
    artifact = opened(url)
    Folder(url).write("00000.parquet", b"of a dead attempt")
    after_decision(monkeypatch, lambda folder: folder.remove(ATTEMPTS))
    record = commit(artifact)
    assert artifact.committed() == {"00000": record} and verify(url).faults == [] and objects(url, ATTEMPTS) == []
    artifact.close()


def test_on_one_machine_a_run_begins_before_the_last_one_ends_or_after_it(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share scratch files and journals there, which the last one removes."""
    url, begun = f"{s3}/{tmp_path.name}", list[Artifact]()
    first = opened(url, share=True)
    assert first._lock is not None and first._lock.presence is not None
    own = first._lock.presence.owner
    second = threading.Thread(target=lambda: begun.append(opened(url, share=True)))
    look = OutputLock._others

    def others(lock: OutputLock) -> list[Owner]:
        found = look(lock)
        if lock.presence is not None and lock.presence.owner == own:
            second.start()
            second.join(1.0)
            assert not begun and [name for name in objects(url, OWNERS) if own.run not in name] == []
        return found

    monkeypatch.setattr(OutputLock, "_others", others)
    first.close()
    second.join(60)
    record = commit(begun[0])
    begun[0].close()
    assert list(Artifact.open(url).committed()) == [record.shard] and verify(url).faults == []


def test_a_damaged_manifest_is_refused_by_its_readers_and_no_run_ends_in_it(s3: str, tmp_path: Path) -> None:
    """What attempts have aside is kept: nobody knows which of them are committed."""
    url = f"{s3}/{tmp_path.name}"
    artifact = opened(url)
    Folder(url).write(f"{OBJECTS}/00000.json", b"{}\n{cut short")
    Folder(url).write(f"{ATTEMPTS}/{'0' * 32}/00000.parquet", b"aside")
    artifact.close()
    assert objects(url, ATTEMPTS) and objects(url, OWNERS) == []
    with pytest.raises(ArtifactMismatch, match="not an entry of a manifest"):
        opened(url)
    assert objects(url, OWNERS) == []


def test_leftovers_of_any_kind_in_a_folder_are_no_obstacle(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    opened(url, share=True).close()
    claims = tmp_path / "out" / "_capipe" / CLAIMS
    (claims / "a folder.json").mkdir(parents=True)
    (claims / "a folder.json" / "file").touch()
    (claims / "two\nlines.json").touch()
    (claims / "link.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    artifact = opened(url, share=True)
    assert artifact.claims is not None and list(claims.iterdir()) == [] and (tmp_path / "elsewhere").is_dir()
    artifact.close()
