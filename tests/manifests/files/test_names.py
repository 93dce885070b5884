"""What somebody else's artifact names, and what lies in the place of its own files: nothing outside is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import ArtifactMismatch, BadInput
from capipe.manifests import manifest, replacing
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.allowed import Allowed
from capipe.manifests.files.names import checked_name, linked_parent, name_problem
from capipe.manifests.files.outside import Refused
from capipe.manifests.files.storage import Folder, append_line, clear, create, remove, write_new
from capipe.manifests.fingerprint import canonical
from capipe.manifests.journal import Journal
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.schema import INGEST
from capipe.manifests.sharing.claims import Claims
from capipe.manifests.sharing.owners import living
from capipe.manifests.verify import verify

SEMANTIC = {"model": "m"}
OUTSIDE = ["../victim", "../../victim", "/tmp/victim", "a/../../victim", "~root/x", "..", ".", "", "a//b", "./a", "a/"]
STRANGE = [
    "a\\b",
    "C:/x",
    "c:",
    "s3://b/x",
    "zip::x",
    "a\nb",
    "a\0",
    "a\u2028b",
    "x" * 2000,
    "é" * 200,
    "\ud800",
    None,
    3,
]
PLAIN = ["00000.tar", "images/00000/a.jpg", "_capipe/parts/00000.jsonl", "two words.tar", "日本.tar", "~backup.tar"]
PLAIN += ["a\u200db.tar", "..a", "a..b", "c:x.tar", "x:y", "-rf", ".hidden", "a+b", os.fsdecode(b"caf\xe9.tar")]


def make(out: Path, **options: Any) -> Artifact:
    return Artifact.create(str(out), "test", SEMANTIC, {}, **options)


def commit(artifact: Artifact, shard: str = "00000", over: ShardRecord | None = None) -> ShardRecord:
    with artifact.begin(shard, INGEST, over=over) as transaction:
        transaction.write({"key": "a", "uid": "a" * 32, "status": "ok", "error": None})
        return transaction.commit(rows_in=1, input_info={"digest": "x"})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An artifact with a shard, beside a folder and a file that are not its own."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/keep").write_text("kept")
    (tmp_path / "file").write_text("kept")
    artifact = make(tmp_path / "out")
    commit(artifact)
    artifact.close()
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path) -> Any:
    """After each test what is not the artifact's is as it was."""
    yield
    if (tmp_path / "out").exists():
        assert (tmp_path / "victim/keep").read_text() == "kept" == (tmp_path / "file").read_text()
        assert [each.name for each in (tmp_path / "victim").iterdir()] == ["keep"]
        assert {each.name for each in tmp_path.iterdir()} == {"victim", "file", "out"}


def forged(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the manifest's one line anew, changed, with a checksum that fits."""
    path = out / "_capipe/manifest.jsonl"
    entry = json.loads(path.read_bytes())
    del entry[manifest.CHECKSUM]
    change(entry)
    path.write_text(canonical({**entry, manifest.CHECKSUM: manifest._checksum(entry)}) + "\n")


@pytest.mark.parametrize("name", [*OUTSIDE, *STRANGE], ids=ascii)
def test_a_name_that_leads_elsewhere_is_told(name: Any) -> None:
    problem = name_problem(name)
    assert problem is not None and problem.isprintable() and len(problem) < 1200
    with pytest.raises(ValueError):
        checked_name(name)


@pytest.mark.parametrize("name", PLAIN, ids=ascii)
def test_a_plain_name_passes_as_it_is(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["../victim", "/tmp/x", "_capipe/../../victim", "a\\b", "x::y", 5])
@pytest.mark.parametrize("where", ["files", "shard", "input", "shards"])
def test_a_manifest_that_names_what_is_outside_is_refused_when_it_is_read(made: Path, where: str, name: Any) -> None:
    def change(entry: dict[str, Any]) -> None:
        if where == "files":
            entry["files"][str(name) if name != 5 else ".."] = {"bytes": 1, "sha256": "0" * 64}
        elif where == "shard":
            entry["shard"] = name
        else:
            entry["input"] = {"digest": "x", "shards": [{"name": name, "digest": "x"}]}

    forged(made, change)
    with pytest.raises(ArtifactMismatch, match=r"manifest\.jsonl:1: not a manifest line"):
        Artifact.open(str(made)).committed()
    with pytest.raises(ArtifactMismatch, match="not a manifest line"):
        verify(str(made))
    with pytest.raises(ArtifactMismatch, match="not a manifest line"):
        make(made, fresh=True)
    assert (made / "00000.parquet").exists()  # refused before anything was removed


@pytest.mark.parametrize("file", [{"bytes": 4}, {"sha256": "x"}, {"bytes": "4", "sha256": "x"}, "x", 4])
def test_files_over_all_shards_are_listed_with_size_and_hash(made: Path, file: object) -> None:
    path = made / "_capipe/config.json"
    config = json.loads(path.read_bytes())
    config["run"] = {"extras": [], "finals": {"sizes.json": file}}
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactMismatch, match=r"config\.json: unreadable"):
        Artifact.open(str(made))


@pytest.mark.parametrize("key", ["extras", "finals"])
def test_a_configuration_that_names_what_is_outside_is_refused(made: Path, key: str) -> None:
    path = made / "_capipe/config.json"
    config = json.loads(path.read_bytes())
    config["run"] = {"extras": ["README.md", "../victim"]} if key == "extras" else {"finals": {"../file": {"bytes": 4}}}
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactMismatch, match=r"config.json: .*the name '../\w+' climbs out of its folder"):
        Artifact.open(str(made))
    if key == "extras":
        with pytest.raises(ArtifactMismatch, match="climbs out"):
            make(made, fresh=True)
    assert (made / "00000.parquet").exists()


def test_a_shard_is_not_begun_under_a_name_that_leads_elsewhere(made: Path) -> None:
    artifact = make(made)
    for name in ("../file", "a/b/../../../file"):
        for begin in (lambda name=name: artifact.begin(name, INGEST), lambda name=name: artifact.begin_files(name)):
            with pytest.raises(ValueError, match="climbs out"):
                begin()
        with pytest.raises(ValueError, match="climbs out"):
            artifact.journal(name)
    with artifact.begin_files("00001") as files, pytest.raises(ValueError, match="climbs out"):
        files.path("../../../../file")
    artifact.close()


@pytest.mark.parametrize("token", ["../../../victim", "../../victim", "", "0123456789abcdef-0/../..", 5, None])
def test_a_forged_claim_is_none(made: Path, token: Any) -> None:
    run = "0123456789abcdef"
    for folder, name, entry in [
        ("claims", "00001", {"token": token, "run": run}),
        ("owners", run, {"run": "../../../file", "host": "far", "pid": "../1", "machine": None, "born": None}),
    ]:
        (made / f"_capipe/{folder}").mkdir(exist_ok=True)
        (made / f"_capipe/{folder}/{name}.json").write_text(json.dumps(entry))
    claims = Claims(Folder(str(made)))
    assert living(Folder(str(made))) == [claims.owner]
    assert claims.holder("00001") is None and claims.take("00001") is not None
    claims.close()


def test_a_note_of_a_forged_redo_is_refused(made: Path) -> None:
    record = manifest.read(Folder(str(made)))["00000"]
    aside = made / "_capipe/redo/00000"
    aside.mkdir(parents=True)
    bad = {**asdict(record), "files": {"../file": {"bytes": 4, "sha256": "0" * 64}}}
    (aside / "..+file").write_text("evil")
    (aside / replacing._LINE).write_text(json.dumps([asdict(record.retraction()), bad, []]))
    with pytest.raises(ArtifactMismatch, match="climbs out"):
        make(made)
    other = replace(record, shard="00001", files={"00001.parquet": {"bytes": 1, "sha256": "0" * 64}})
    (aside / replacing._LINE).write_text(json.dumps([asdict(other.retraction()), asdict(other), []]))
    with pytest.raises(ArtifactMismatch, match="lines of the shards 00001"):
        make(made)
    assert list(manifest.read(Folder(str(made)))) == ["00000"]


@pytest.mark.parametrize("name", ["", "tmp", "journal", "redo", "claims", "owners", "quarantine"])
def test_nothing_is_written_or_removed_through_a_linked_private_folder(made: Path, name: str) -> None:
    """Either it is refused in a line, or the link itself is replaced; what it leads to keeps its files."""
    (made.parent / "victim/keep").rename(made.parent / "keep")  # by a name that all of these would clear
    victim, place = made.parent / "victim", made / "_capipe" / name
    if name == "":
        for each in list(place.iterdir()):
            shutil.move(each, victim / each.name)
    (victim / "00000.jsonl").write_text("kept")
    before = {each.name: each.read_bytes() for each in victim.iterdir() if each.is_file()}
    clear(place)
    place.symlink_to(victim)
    for share in (False, True):
        try:
            artifact = make(made, share=share)
        except BadInput as error:
            assert "a symbolic link" in str(error)
            continue
        with pytest.raises(BadInput, match="a symbolic link") if place.is_symlink() else nullcontext():
            artifact.quarantine("00000", "x") if name == "quarantine" else artifact.journal("00001").append(0, {})
            commit(artifact, "00001")
        artifact.close()
    assert before == {each.name: each.read_bytes() for each in victim.iterdir() if each.is_file()}
    clear(victim)
    victim.mkdir()
    (made.parent / "keep").rename(victim / "keep")


@pytest.mark.parametrize("name", ["lock", "guard", "manifest.jsonl", "times.jsonl"])
def test_a_link_in_the_place_of_a_file_that_stays_is_refused(made: Path, name: str) -> None:
    path = made / "_capipe" / name
    path.unlink(missing_ok=True)
    path.symlink_to(made.parent / "file")
    with pytest.raises((BadInput, ArtifactMismatch)):
        artifact = make(made, share=True)
        try:
            commit(artifact, "00001")
        finally:
            artifact.close()
    assert (made.parent / "file").stat().st_size == 4


@pytest.mark.parametrize("name", ["config.json", "quarantine/00000.json", "owners/0123456789abcdef.json"])
def test_a_link_in_the_place_of_a_file_that_is_replaced_is_replaced_itself(made: Path, name: str) -> None:
    path = made / "_capipe" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(made.parent / "file")
    Folder(str(made)).write(f"_capipe/{name}", b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink()
    path.unlink()
    path.symlink_to(made.parent / "nowhere")
    write_new(path, b"newer")
    assert path.read_bytes() == b"newer" and not path.is_symlink()


def test_links_in_the_place_of_a_shards_files_are_replaced_and_removed_themselves(made: Path) -> None:
    for name, target in [("00001.parquet", "file"), ("00001_stats.json", "nowhere")]:
        (made / name).symlink_to(made.parent / target)
    (made / "extra").symlink_to(made.parent / "victim")
    artifact = make(made)
    commit(artifact, "00001")
    artifact.note(extras=["extra"])
    artifact.close()
    assert not any((made / name).is_symlink() for name in ("00001.parquet", "00001_stats.json"))
    assert all("not unique" in fault for fault in verify(str(made)).faults)
    make(made, fresh=True).close()
    assert not (made / "extra").is_symlink() and not (made / "00001.parquet").exists()


def test_a_file_is_not_published_or_removed_below_a_link(made: Path) -> None:
    (made / "images").symlink_to(made.parent / "victim")
    folder = Folder(str(made))
    assert linked_parent(made, "images/a") == made / "images" and linked_parent(made, "images") is None
    for act in (
        lambda: folder.remove("images/keep"),
        lambda: folder.write("images/keep", b"new"),
        lambda: folder.write("images/new/b", b"new"),
    ):
        with pytest.raises(BadInput, match="images: a symbolic link"):
            act()
    artifact = make(made)
    with artifact.begin_files("00001") as files:
        (files.tree("images/00001") / "a.jpg").write_bytes(b"x")
        with pytest.raises(BadInput, match="images: a symbolic link"):
            files.commit(rows={}, input_info={"digest": "x"})
    artifact.close()
    assert list(manifest.read(folder)) == ["00000"]


def test_scratch_names_are_new_and_nothing_is_left_of_them(made: Path) -> None:
    artifact = make(made)
    (made / "_capipe/tmp").mkdir(exist_ok=True)
    for name in ("00001.parquet", "00001.tar", "00001_stats.json", "00002.files"):  # as they were once called
        (made / "_capipe/tmp" / name).symlink_to(made.parent / "file")
    with artifact.begin("00001", INGEST) as first:
        assert first._scratch.parent == made / "_capipe/tmp" and len(first._scratch.name) > len("00001") + 16
        with artifact.begin("00001", INGEST) as second:  # of a worker in whose place another came
            assert not first._scratch.exists() and second._scratch.exists()
    commit(artifact, "00001")
    artifact.close()
    assert not (made / "_capipe/tmp").exists()


def test_a_file_is_created_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        create(tmp_path / "link")
    (tmp_path / "log").symlink_to(tmp_path / "other")
    with pytest.raises(BadInput, match="log: a symbolic link"):
        append_line(tmp_path / "log", b"x")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "log"]
    remove(tmp_path / "link")
    clear(tmp_path / "log")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_of_a_file_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".chain.json.0123456789abcdef.partial"
    left.symlink_to(tmp_path / "nowhere")
    (tmp_path / ".chain.json.mine.partial").write_text("another's")
    write_new(tmp_path / "chain.json", b"{}")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".chain.json.mine.partial", "chain.json"]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(made: Path) -> None:
    for name in ("_capipe/config.json", "_capipe/manifest.jsonl", "00000.parquet"):
        path = made / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        if name.endswith("parquet"):
            assert "0 bytes" in verify(str(made)).faults[0]
            with pytest.raises(OSError, match="not a regular file"):
                make(made).parquet("00000")
        else:
            with pytest.raises(ArtifactMismatch, match="not a regular file"):
                Artifact.open(str(made)).committed()
        path.unlink()
        path.write_bytes(kept)
    os.mkfifo(made / "_capipe/00000.jsonl")
    assert Journal(made / "_capipe/00000.jsonl", "f").rows == {}


def test_an_input_that_a_configuration_names_is_opened_where_it_may_lead(made: Path) -> None:
    allowed = Allowed(str(made))
    assert allowed.place(str(made)) == str(made)
    for location in (
        "reference://x::http://127.0.0.1:1/evil.json",
        "http://127.0.0.1:1/x",
        "s3://bucket/x",
        "/proc/1",
        5,
    ):
        with pytest.raises(Refused):
            allowed.place(location)


def test_a_second_name_of_a_file_behind_a_link_is_that_files(made: Path) -> None:
    data = (made / "00000.parquet").read_bytes()
    (made.parent / "victim/blob").write_bytes(data)
    (made / "00000.parquet").unlink()
    (made / "00000.parquet").symlink_to("../victim/blob")
    artifact = make(made)
    with artifact.begin_files("00001") as files:
        files.link(made / "00000.parquet", "00001.parquet", hashlib.sha256(data).hexdigest())
        files.commit(rows={"ok": 1}, input_info={"digest": "x"})
    artifact.close()
    (made.parent / "victim/blob").unlink()
    assert (made / "00001.parquet").read_bytes() == data and not (made / "00001.parquet").is_symlink()
