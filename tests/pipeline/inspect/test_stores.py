"""Status, report, viewer and verification of a folder of artifacts in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import CONFIG, Artifact
from capipe.manifests.files.storage import Folder
from capipe.pipeline.inspect.status_view import overview
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.jobs.eval import report_on, write_report
from capipe.pipeline.jobs.select import plan_select, write_group
from capipe.pipeline.report.page import write_report as write_page
from capipe.pipeline.view.library import Library, id_of
from capipe.pipeline.view.queries import Finder, Query
from capipe.stages.filter.select import SelectConfig

from ...storing import StoreProxy, forget_stores
from ..conftest import capipe, one_line
from ..looking import write_captions, write_chain
from ..report.test_page import Page

UNKNOWN = ("idle", "rate", "eta", "rows_total")  # of copies


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain without training, whose output stays local."""
    folder = write_chain(tmp_path_factory.mktemp("looked") / "chain", [6, 5])
    (folder / "run/run.json").unlink()
    for name in ("eval", "eval-trained"):
        write_report(report_on(Artifact.open(str(folder / name / "graded"))), str(folder / name))
    return folder


@pytest.fixture
def url(local: Path, s3: str, tmp_path: Path) -> str:
    """The same in a bucket, as `aws s3 cp --recursive` copies it."""
    place = Folder(f"{s3}/{tmp_path.name}/chain")
    files = [path for path in local.rglob("*") if path.is_file()]
    place.fs.put_all({str(path): place.full(path.relative_to(local).as_posix()) for path in files})
    return place.url


def counts(folder: str) -> dict[str, Any]:
    artifacts = overview(folder).as_json()["artifacts"]
    return {name: {key: value for key, value in part.items() if key not in UNKNOWN} for name, part in artifacts.items()}


def test_status_of_a_bucket_is_that_of_the_folder(local: Path, url: str) -> None:
    assert counts(url) == counts(str(local)) and len(counts(url)) == 9
    assert overview(f"{url}/captions").alone
    with pytest.raises(BadInput, match="no artifact, training run or chain"):
        overview(f"{url}/nothing")


def test_the_folders_of_artifacts_are_not_listed(store: StoreProxy, url: str) -> None:
    """They may hold a million objects: configuration and manifest are asked for by name."""
    store.requests.clear()
    overview(url)
    queries = (parse_qs(urlsplit(path).query) for method, path in store.requests)
    listed = {query["prefix"][0] for query in queries if "prefix" in query}
    root = url.removeprefix("s3://bucket/")
    assert f"{root}/" in listed and not listed & {f"{root}/captions/", f"{root}/shards/", f"{root}/filtered/scores/"}


def test_the_report_of_a_bucket(local: Path, url: str, tmp_path: Path) -> None:
    here = Page(Path(write_page(local, tmp_path / "here.html")).read_text(encoding="utf-8"))
    assert write_page(url) == f"{url}/report.html"
    there = Page(Folder(url).read_bytes("report.html").decode())
    assert [tag for tag, _ in there.tags] == [tag for tag, _ in here.tags] and len(here.named("img")) == 8
    assert write_page(f"{url}/", tmp_path / "there.html") == str(tmp_path / "there.html")
    done = capipe("report", url)
    assert done.stdout.strip() == f"{url}/report.html"
    assert one_line(capipe("report", f"{url}/nothing", code=2)).startswith(f"capipe: {url}/nothing: no artifact")


def test_the_viewer_of_a_bucket(local: Path, url: str, monkeypatch: Any) -> None:
    here, there = Library(local), Library(url)
    assert {**there.catalog(), "folder": ""} == {**here.catalog(), "folder": ""}
    table = there.table(id_of("captions"))
    assert Finder().page(table, Query(search="red"), None, 24).rows
    assert there.image(id_of("captions"), "00000", 0, small=False) == here.image(id_of("captions"), "00000", 0, False)
    write_captions(local / "shards", local.parent / "more", lambda index: "more")
    before = len(there.catalog()["artifacts"])
    place = Folder(f"{url}/more")
    files = [path for path in (local.parent / "more").rglob("*") if path.is_file()]
    place.fs.put_all({str(path): place.full(path.relative_to(local.parent / "more").as_posix()) for path in files})
    assert place.exists(CONFIG) and len(there.catalog()["artifacts"]) == before  # looks again after a while
    monkeypatch.setattr(there, "_look_after", 0.0)
    monkeypatch.setattr(there, "_walked", float("-inf"))
    assert len(there.catalog()["artifacts"]) == before + 1


def test_verification_reads_each_object_once(store: StoreProxy, url: str) -> None:
    store.requests.clear()
    report = verify(f"{url}/shards")
    assert report.faults == [] and report.shards == 2
    read = [path for method, path in store.requests if method == "GET" and path.endswith((".tar", ".parquet", ".json"))]
    objects = [path for path in read if "_capipe" not in path]
    assert sorted(objects) == sorted(set(objects)) and len(objects) == 6
    fs, path = Folder(url).fs, Folder(url).full("shards/00001.tar")
    data = bytearray(fs.read(path))
    data[len(data) // 2] ^= 1
    fs.write(bytes(data), path)
    forget_stores()
    assert verify(f"{url}/shards").faults == [f"{url}/shards/00001.tar: its sha256 is not the one that was committed"]


def test_a_selection_reads_scores_once_to_plan_and_once_to_write(store: StoreProxy, url: str) -> None:
    scores = Artifact.open(f"{url}/filtered/scores")
    store.requests.clear()
    plan = plan_select(scores, f"{url}/shards", f"{url}/again", SelectConfig(keep="clip_score > -1", shard_size=4))
    for task in plan.todo:
        write_group(task, plan.selection.rule, plan.sources, plan.artifact)
    plan.artifact.close()
    assert len(plan.todo) == 2 and verify(f"{url}/again").faults == []
    # The first one also says whether it fits the shards, and which captions are to be written.
    for shard, times in (("00000", 4), ("00001", 2)):
        assert store.count("GET", f"/filtered/scores/{shard}.parquet") == times
    assert store.count("GET", "/shards/00001.tar") == 1
