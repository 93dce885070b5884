"""Commands over many shards: what they read is counted, since times say little. The times are bench/scaling.py's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capipe.manifests import manifest
from capipe.manifests.artifact import Artifact
from capipe.manifests.files import overwriting
from capipe.pipeline.commands.filter import select_step
from capipe.pipeline.commands.run_job import Exit
from capipe.pipeline.inspect import throughput
from capipe.pipeline.inspect.status_view import overview
from capipe.pipeline.jobs.rows.engine import plan
from capipe.pipeline.report.page import write_report
from capipe.stages.filter.saved_plan import PLAN
from capipe.stages.filter.select import SelectConfig

from ..stages.exporting import export, final_shards
from ..stages.scored import write_scores
from .looking import words, write_captions, write_images
from .viewing import client_of, get

MANY = 30


class Counts:
    """``parquets``: opened; ``lines``: of manifests, parsed."""

    def __init__(self) -> None:
        self.parquets = self.lines = 0

    def of(self, work: Callable[[], Any]) -> tuple[int, int]:
        """Parquets opened and lines parsed by ``work``."""
        before = self.parquets, self.lines
        work()
        return self.parquets - before[0], self.lines - before[1]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    made = Counts()
    opened, parsed = pq.ParquetFile.__init__, manifest.parsed

    def opening(self: pq.ParquetFile, *args: Any, **options: Any) -> None:
        made.parquets += 1
        opened(self, *args, **options)

    def parsing(line: bytes) -> manifest.ShardRecord:
        made.lines += 1
        return parsed(line)

    monkeypatch.setattr(pq.ParquetFile, "__init__", opening)
    monkeypatch.setattr(manifest, "parsed", parsing)
    yield made


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, captions and scores of :data:`MANY` shards."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder / "shards", [3] * MANY)
    write_captions(folder / "shards", folder / "captions")

    def values(index: int, row: Any) -> dict[str, Any]:
        return {"re_caption": words(index), "re_length": 8, "re_clip_score": index / 100}

    write_scores(folder / "shards", folder / "scores", values)
    return folder


class Nothing:
    """A stage without a model, of which plans are made."""

    name, setup = "annotate", None

    def semantic(self) -> dict[str, Any]:
        return {"model": "m"}


def planned(folder: Path, out: str) -> int:
    """Number of shards left to do."""
    job = plan(Nothing(), str(folder / "shards"), str(folder / out))  # type: ignore[arg-type]
    job.artifact.close()
    return len(job.todo)


def test_start_and_resume_parse_each_line_once_and_open_no_shard(
    chain: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[str] = []
    plain = Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda self: resolved.append(str(self)) or plain(self))
    assert counts.of(lambda: planned(chain, "new")) == (0, MANY)
    assert planned(chain, "new") == MANY and planned(chain, "captions") == 0
    assert counts.of(lambda: planned(chain, "captions")) == (0, 2 * MANY)
    assert len(resolved) < MANY  # the folders' places, not the shards'
    lines = chain / "captions" / manifest.LINES
    whole = lines.read_bytes()
    try:
        lines.write_bytes(whole[: whole[:-1].rfind(b"\n") + 1])
        assert planned(chain, "captions") == 1
    finally:
        lines.write_bytes(whole)


def test_inputs_behind_links_are_still_found(tmp_path: Path) -> None:
    """The slow twin resolves every path as a whole."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.tar").touch()
    (tmp_path / "seen").symlink_to("real")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.tar").touch()
    (tmp_path / "real/b.tar").symlink_to("../out/b.tar")
    for source in ("real/a.tar", "seen/a.tar", "seen/b.tar", "real/../seen/b.tar", "out/..", "seen/.", "none/x.tar"):
        path, folders = tmp_path / source, dict[Path, Path]()
        found = set(overwriting._places(str(path), folders))
        assert {str(path.resolve()), str(path.parent.resolve() / path.name)} >= found
        assert str(path.resolve()) in found, source


def test_status_looks_at_the_newest_files_alone(chain: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "WINDOW", 4)
    seen: list[str] = []
    plain = throughput._modified
    monkeypatch.setattr(throughput, "_modified", lambda artifact, name: seen.append(name) or plain(artifact, name))
    assert counts.of(lambda: overview(str(chain / "captions"))) == (0, MANY)
    assert seen == [f"{number:05d}.parquet" for number in range(MANY - 4, MANY)]
    assert counts.of(lambda: overview(str(chain)))[0] == 0


@pytest.mark.parametrize("index", [False, True])
def test_a_selection_that_is_done_reads_no_row_again(chain: Path, tmp_path: Path, counts: Counts, index: bool) -> None:
    scores = Artifact.open(str(chain / "scores"))

    def select(**more: Any) -> Exit:
        config = SelectConfig(top=0.5, shard_size=7, index=index, **more)
        return select_step(scores, str(chain / "shards"), str(tmp_path / "out"), config, workers=0)

    select()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read, _ = counts.of(lambda: select())
    assert read <= 3 and files == {path: path.read_bytes() for path in files}  # for what is said of unread rows
    (tmp_path / "out" / PLAN).write_text("{}")  # as good as none
    assert counts.of(lambda: select())[0] > 2 * MANY
    assert files == {path: path.read_bytes() for path in files}
    (tmp_path / "out/_capipe/uids.npy").unlink()
    select()
    assert files == {path: path.read_bytes() for path in files}


def test_a_plan_of_other_scores_is_not_used(chain: Path, tmp_path: Path, counts: Counts) -> None:
    scores = Artifact.open(str(chain / "scores"))
    plan_of: dict[float, bytes] = {}
    for top in (0.5, 0.9):
        select_step(scores, str(chain / "shards"), str(tmp_path / f"{top}"), SelectConfig(top=top), workers=0)
        plan_of[top] = (tmp_path / f"{top}" / PLAN).read_bytes()
    (tmp_path / "0.9" / PLAN).write_bytes(plan_of[0.5])
    select_step(scores, str(chain / "shards"), str(tmp_path / "0.9"), SelectConfig(top=0.9), workers=0)
    assert (tmp_path / "0.9" / PLAN).read_bytes() == plan_of[0.9]


def test_an_export_that_is_done_reads_no_row_again(tmp_path: Path, counts: Counts) -> None:
    source, out = final_shards(tmp_path / "final", shards=6, rows=6), tmp_path / "out"
    notes = export(source, out)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert counts.of(lambda: export(source, out))[0] == 0
    (out / "README.md").write_text("mine")
    read, _ = counts.of(lambda: export(source, out))
    assert 0 < read <= 3 * 6 and export(source, out) == notes  # the last files alone are written again
    assert files == {path: path.read_bytes() for path in files}
    export(source, out, license="mit")
    assert "license: mit" in (out / "README.md").read_text()


def test_a_page_of_the_viewer_opens_the_shards_that_it_shows(chain: Path, counts: Counts) -> None:
    with client_of(chain) as client:
        listed = get(client, "catalog")["artifacts"]
        a = next(entry["id"] for entry in listed if entry["name"] == "captions")

        def page() -> None:
            get(client, "columns", a=a)
            assert len(get(client, "rows", a=a, limit=3)["rows"]) == 3

        opened, parsed = counts.of(page)
        assert 0 < opened <= 12 and parsed == 0


def test_a_viewer_whose_folder_is_as_it_was_reads_no_manifest_again(
    chain: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capipe.pipeline.view import library

    monkeypatch.setattr(library, "_LOOK", 0.0)
    monkeypatch.setattr(library, "_SHARE", 0.0)
    monkeypatch.setattr(library, "_WALK", 0.0)
    found = library.Library(chain)
    join = found._join
    assert counts.of(found.refresh) == (0, 0) and found._join is join
    write_captions(chain / "shards", chain / "later", only=1)
    found.refresh()
    assert found._join is not join and "later" in found._join.records


def test_a_report_reads_a_few_shards_of_each_artifact(chain: Path, tmp_path: Path, counts: Counts) -> None:
    from capipe.pipeline.report import facts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "SHARDS", 4)
        few = counts.of(lambda: write_report(chain, tmp_path / "report.html"))[0]
    assert few < 2 * MANY


@pytest.mark.parametrize("format", ["webdataset", "llava"])
def test_a_damaged_shard_of_many_is_one_line_and_the_others_go_on(
    tmp_path: Path, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = final_shards(tmp_path / "final", shards=6, rows=6), tmp_path / "out"
    tar = source / "00003.tar"
    sound = tar.read_bytes()
    tar.write_bytes(sound[:700] + b"?" + sound[701:])
    assert export(source, out, format) is None  # not complete, so no last files
    artifact = Artifact.open(str(out))
    assert list(artifact.committed()) == ["00000", "00001", "00002", "00004", "00005"]
    (reason,) = artifact.quarantined().values()
    assert reason.startswith(f"{tar}: ") and "`capipe verify`" in reason and "\n" not in reason
    assert "trying again" not in capfd.readouterr().err
    tar.write_bytes(sound)
    assert export(source, out, format) is not None and len(Artifact.open(str(out)).committed()) == 6


def test_a_damaged_shard_stops_no_selection_of_the_others(chain: Path, tmp_path: Path) -> None:
    """Once the rows are chosen: damaged scores would leave the threshold open, and are refused before."""
    from capipe.pipeline.jobs.select import execute_select, plan_select

    scores = Artifact.open(str(chain / "scores"))
    config = SelectConfig(keep="clip_score >= 0", shard_size=2)
    made = plan_select(scores, str(chain / "shards"), str(tmp_path / "out"), config, workers=0)
    tar = chain / "shards/00004.tar"
    sound = tar.read_bytes()
    tar.write_bytes(sound[:700] + b"?" + sound[701:])
    try:
        outcome = execute_select(made, lambda event: None, threading.Event())
    finally:
        tar.write_bytes(sound)
        made.artifact.close()
    assert list(outcome.quarantined) == ["00004"] and len(made.artifact.committed()) == MANY - 1
