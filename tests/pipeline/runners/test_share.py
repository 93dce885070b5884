"""`--share`: several commands, one output folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from capipe.manifests.artifact import Artifact
from capipe.pipeline.inspect.verify import verify

from ..conftest import COMMAND, CaptionServer, capipe, one_line, table
from ..sharing import CAPTIONS, IMAGES, lines, rendered, same_shards, wait_until


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def alone(shards: Path) -> Path:
    """The captions of a run that shared with nobody."""
    out = shards.parent / "alone"
    capipe("annotate", "--shards", shards, "--out", out, *CAPTIONS)
    return out


def start(shards: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    words = [*COMMAND, "annotate", "--shards", shards, "--out", out, "--share", *more]
    return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    stderr = process.communicate(timeout=280)[1]
    assert process.returncode == code, stderr
    return stderr


def until_it_says(process: subprocess.Popen[str], words: str, seconds: float = 100) -> str:
    """The line with these words."""
    assert process.stderr is not None
    impatient = threading.Timer(seconds, process.kill)
    impatient.start()
    said = []
    while line := process.stderr.readline():
        said.append(line)
        if words in line:
            impatient.cancel()
            return line
    raise AssertionError(f"it ended without saying {words!r}: {said}")


def through(server: CaptionServer) -> list[str]:
    return ["--engine", server.url, "--model", "m", "--decode-workers", "1", "--concurrency", "2"]


def test_two_commands_share_the_work(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    """Each image is asked for once, whoever asks."""
    out = tmp_path / "out"
    both = [start(shards, out, *through(server)) for _ in range(2)]
    for process in both:
        ended(process)
    assert server.requests == IMAGES and sorted(lines(out)) == [f"{number:05d}" for number in range(8)]
    assert [row["status"] for row in table(out)] == ["ok"] * IMAGES
    assert not (out / "_capipe/claims").exists()


def test_the_other_goes_on_where_one_was_killed(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    """The first hangs in a request with all shards that are left; the second waits, then finds it dead."""
    out, hang = tmp_path / "out", True
    server.fails = lambda number, image: 0 if hang and number > 12 else 200
    first = start(shards, out, *through(server))
    wait_until(lambda: server.requests >= 14)
    done = len(lines(out))
    hang = False
    second = start(shards, out, *through(server))
    wait_until(lambda: len(lines(out)) > done)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    ended(second)
    assert len(set(lines(out))) == len(lines(out)) == 8
    assert [row["status"] for row in table(out)] == ["ok"] * IMAGES
    assert server.requests <= IMAGES + 4  # finished rows came from the dead one's journals
    assert not (out / "_capipe/claims").exists() and not (out / "_capipe/tmp").exists()


def test_sigterm_drains(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    """A batch system tells all processes of a job to end; what is in the engine is finished and kept."""
    out = tmp_path / "out"
    slow = start(shards, out, *through(server), "--concurrency", "1")
    wait_until(lambda: server.requests >= 10)
    os.killpg(slow.pid, signal.SIGTERM)
    stderr = ended(slow, 143)
    assert "stopped; run the same command to go on" in stderr
    ended(start(shards, out, *through(server)))
    assert [row["status"] for row in table(out)] == ["ok"] * IMAGES and server.requests <= IMAGES + 2


def test_what_needs_the_folder_for_itself_is_refused(shards: Path, tmp_path: Path, server: CaptionServer) -> None:
    common = ["annotate", "--shards", shards, *through(server)]
    for word in ("--fresh", "--retry"):
        done = capipe(*common, "--out", tmp_path / "out", "--share", word, code=2)
        assert one_line(done).startswith(f"capipe: {word}: takes committed shards back")
    assert not (tmp_path / "out").exists()
    first = Artifact.create(str(tmp_path / "out"), "other", {}, {}, share=True)
    done = capipe(*common, "--out", tmp_path / "out", code=2)
    assert "another capipe process is writing here (process" in one_line(done)
    first.close()
    done = capipe(*common, "--out", "memory://out", "--share", code=2)
    assert "--share needs a file system with locks, or a store with conditional creation" in one_line(done)


STOPPED_IN_ITS_COMMIT = """
import os, signal, sys
from capipe.manifests import publishing
from capipe.manifests.artifact import Artifact
from capipe.pipeline.inspect.verify import verify
from capipe.manifests.schema import ANNOTATE
from capipe.manifests.shards import RowReader, expand

def append(folder, record, append=publishing.manifest.append):
    os.kill(os.getpid(), signal.SIGSTOP)
    append(folder, record)

publishing.manifest.append = append
shards, out = sys.argv[1:]
found = Artifact.open(out).config
semantic = {key: value for key, value in found["semantic"].items() if key not in ("stage", "schema_version")}
artifact = Artifact.create(out, found["stage"], semantic, {}, share=True)
left = [shard for shard in expand(shards) if shard.name not in artifact.committed()]
shard, token = next((shard, token) for shard in left if (token := artifact.claims.take(shard.name)) is not None)
reader, rows = RowReader(shard), 0
with artifact.begin(shard.name, ANNOTATE, claim=token) as made:
    for row in reader:
        captions = [{"name": "plain", "text": "made by the stopped one", "status": "ok"}]
        made.write({"key": row.key, "uid": row.uid, "status": "ok", "captions": captions})
        rows += 1
    made.commit(rows_in=rows, input_info=reader.info)
artifact.close()
"""


@pytest.mark.slow
def test_a_process_stopped_in_its_commit_is_named_and_does_not_keep_others(
    shards: Path, tmp_path: Path, server: CaptionServer
) -> None:
    """It has the guard, so that nobody else commits. The others say so, end by a signal, and lose nothing."""
    out = tmp_path / "out"
    server.fails = lambda number, image: 503 if number > 8 else 200
    running = start(shards, out, *through(server))
    wait_until(lambda: server.requests >= 10)
    stopped = subprocess.Popen([sys.executable, "-c", STOPPED_IN_ITS_COMMIT, str(shards), str(out)])
    try:
        wait_until(lambda: Path(f"/proc/{stopped.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        done = lines(out)
        server.fails = lambda number, image: 200
        for process, number, code in (
            (running, signal.SIGTERM, 143),
            (start(shards, out, *through(server)), signal.SIGINT, 130),
            (start(shards, out, *through(server)), signal.SIGTERM, 143),
        ):
            said = until_it_says(process, f"waiting for process {stopped.pid} on ")
            assert "kill -CONT" in said
            os.killpg(process.pid, number)
            assert "run the same command to go on" in ended(process, code)
        assert lines(out) == done
        last = start(shards, out, *through(server))
        until_it_says(last, f"waiting for process {stopped.pid} on ")
        stopped.send_signal(signal.SIGCONT)
        ended(last)
        assert stopped.wait(60) == 0
    finally:
        stopped.kill()
    assert sorted(lines(out)) == [f"{number:05d}" for number in range(8)]
    texts = [row["captions"][0]["text"] for row in table(out)]
    assert texts.count("made by the stopped one") == 8 and len(texts) == IMAGES
    assert verify(str(out)).faults == []


@pytest.mark.slow
def test_two_captioners_make_what_one_makes(shards: Path, alone: Path, tmp_path: Path) -> None:
    both = [start(shards, tmp_path / "out", *CAPTIONS) for _ in range(2)]
    for process in both:
        ended(process)
    same_shards(tmp_path / "out", alone)


@pytest.mark.slow
def test_one_captioner_is_killed_and_the_other_makes_all(shards: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [start(shards, out, *CAPTIONS) for _ in range(2)]
    wait_until(lambda: len(lines(out)) >= 1)
    os.killpg(both[0].pid, signal.SIGKILL)
    both[0].wait()
    ended(both[1])
    same_shards(out, alone)


@pytest.fixture(scope="module")
def scores(shards: Path) -> Path:
    capipe("filter", "--shards", shards, "--clip", "tiny/clip", "--out", shards.parent / "scored")
    return shards.parent / "scored/scores"


def command_of(name: str, shards: Path, request: pytest.FixtureRequest) -> tuple[list[object], list[str]]:
    """A command without a model, with the artifacts that it writes."""
    scores = request.getfixturevalue("scores") if name == "filter" else ""
    return {
        "ingest": (["ingest", shards.parent / "corpus", "--shard-size", 4], [""]),
        "dedup": (["dedup", "--shards", shards, "--against", shards / "00000.tar"], ["hashes", "against", "marked"]),
        "filter": (["filter", "--shards", shards, "--scores", scores, "--top", 0.6, "--shard-size", 4], ["shards"]),
        "export": (["export", shards, "--shard-size", 4], [""]),
    }[name]


@pytest.mark.parametrize("name", ["ingest", "dedup", pytest.param("filter", marks=pytest.mark.slow), "export"])
def test_two_commands_without_a_model_share_the_work(
    shards: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """Every shard is committed once, and what is over all shards is there."""
    words, parts = command_of(name, shards, request)
    capipe(*words, "--out", tmp_path / "alone")
    line = [*COMMAND, *map(str, words), "--out", str(tmp_path / "out"), "--share", "--workers", "1"]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        ended(process)
    for part in parts:
        same_shards(tmp_path / "out" / part, tmp_path / "alone" / part)
    made = {path.name for path in (tmp_path / "out").rglob("*")}
    assert made >= {path.name for path in (tmp_path / "alone").rglob("*")} - {"claims"}


def test_shards_that_others_may_be_adding_to_are_not_taken_back(shards: Path, tmp_path: Path) -> None:
    words = ["dedup", "--shards", f"{shards}/{{00000..00001}}.tar", "--out", tmp_path / "out"]
    capipe(*words)
    more = ["dedup", "--shards", f"{shards}/{{00000..00002}}.tar", "--out", tmp_path / "out", "--share"]
    assert "run the command once without --share" in one_line(capipe(*more, code=2))
    assert one_line(capipe(*words, "--share", "--fresh", code=2)).startswith("capipe: --fresh: takes committed shards")
