"""The examples of docs/extending.md, run as they stand there: no file of the product knows of them."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
import yaml

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.manifests.shards import uid_of
from capipe.models.engines.loading import check_kind
from capipe.pipeline.chain.command import checked
from capipe.pipeline.inspect.status import state
from capipe.pipeline.inspect.verify import verify
from capipe.pipeline.report.page import write_report
from capipe.pipeline.specs import stage_spec
from capipe.stages.export.formats import writer_class

from ..stages.exporting import final_shards
from .conftest import CaptionServer, capipe, one_line, table
from .looking import write_images

PAGE = Path(__file__).resolve().parents[2] / "docs/extending.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r'"""(\w+\.py)')
EXAMPLES = {title: BLOCK.findall(text) for title, text in SECTION.findall(PAGE.read_text(encoding="utf-8"))}


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one block of a section as a module that can be imported; its name."""
    (block,) = EXAMPLES[request.param]
    named = FILE.match(block)
    assert named is not None, "an example begins with its file's name"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / named[1]).write_text(block, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return named[1].removesuffix(".py")


@pytest.mark.parametrize("example", ["A stage"], indirect=True)
def test_a_stage(example: str, tmp_path: Path, server: CaptionServer) -> None:
    """By itself and in a chain: statuses, resume, retry and verification as of any stage."""
    write_images(tmp_path / "shards", [4, 3])
    failing = True
    server.fails = lambda number, image: 400 if failing and number > 4 else 200
    options = ["--model", "m", "--engine", server.url, "--max-tokens", 8]
    command = [f"{example}:SPEC", "--shards", tmp_path / "shards", "--out", tmp_path / "moods", *options]
    capipe(*command, code=1)
    first = table(tmp_path / "moods")
    assert sorted(row["status"] for row in first) == ["corrupt"] * 2 + ["engine_error"] + ["ok"] * 4
    failing = False
    capipe(*command, "--retry")
    rows = table(tmp_path / "moods")
    assert sorted(row["status"] for row in rows) == ["corrupt"] * 2 + ["ok"] * 5
    assert all(row["mood"].startswith("caption of ") and row["tokens"] == 5 for row in rows if row["status"] == "ok")
    assert [row for row in first if row["status"] == "ok"] == [row for row in rows if row in first and row["mood"]]
    assert verify(str(tmp_path / "moods")).faults == []
    assert state(str(tmp_path / "moods")).complete


@pytest.mark.slow
@pytest.mark.parametrize("example", ["A stage"], indirect=True)
def test_a_stage_in_a_chain(
    example: str, tmp_path: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "modules")
    write_images(tmp_path / "shards", [4, 3])
    config = {"model": "m", "engine": server.url, "max-tokens": 8}
    stage = {"stage": f"{example}:SPEC", "inputs": {"shards": {"path": str(tmp_path / "shards")}}, "config": config}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"stages": {"moods": stage}}))
    with pytest.raises(BadInput, match="max-tokens"):
        checked(tmp_path / "chain.yaml", ["stages.moods.config.max-tokens=0"])
    chain = ["run", tmp_path / "chain.yaml", "--out", tmp_path / "out"]
    capipe(*chain)
    assert [row["mood"] is None for row in table(tmp_path / "out/moods")] == [False] * 3 + [True] + [False] * 2 + [True]
    assert "done before" in capipe(*chain).stderr
    assert "mood" in Path(write_report(tmp_path / "out")).read_text(encoding="utf-8")


@pytest.mark.parametrize("example", ["An export format"], indirect=True)
def test_an_export_format(example: str, tmp_path: Path) -> None:
    """Its files are committed and verified as those of any format, the card says how to read them."""
    final_shards(tmp_path / "final", shards=2, rows=6)
    command = ["export", tmp_path / "final", "--format", f"{example}:TsvWriter", "--workers", "1"]
    capipe(*command, "--out", tmp_path / "out")
    lines = [line.split("\t") for path in sorted((tmp_path / "out").glob("*.tsv")) for line in path.open()]
    kept = [row for row in table(tmp_path / "final") if row["status"] == "ok"]
    assert [(key, caption.strip()) for key, caption, _ in lines] == [(row["key"], row["caption"]) for row in kept]
    assert [uid_of(base64.b64decode(image)) for *_, image in lines] == [row["uid"] for row in kept]
    assert verify(str(tmp_path / "out")).faults == []
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "three columns" in card and "configs:" not in card


@pytest.mark.parametrize("example", ["An engine"], indirect=True)
def test_an_engine(example: str, tmp_path: Path) -> None:
    """`capipe annotate` asks it in a worker process; its import path is in the fingerprint."""
    write_images(tmp_path / "shards", [3])
    command = ["annotate", "--shards", tmp_path / "shards", "--out", tmp_path / "captions", "--gpus", "none"]
    capipe(*command, "--engine", f"{example}:make_engine", "--model", "colours", "--prompt", "plain")
    rows = table(tmp_path / "captions")
    assert [row["status"] for row in rows] == ["ok", "ok", "corrupt"]
    assert all(re.fullmatch(r"An image of [0-9]+ by [0-9]+ pixels\.", row["captions"][0]["text"]) for row in rows[:2])
    semantic = Artifact.open(str(tmp_path / "captions")).config["semantic"]
    assert (semantic["engine"], semantic["model"]) == (f"{example}:make_engine", "colours")


def test_an_import_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    for path, reason in (
        ("no_such_module:SPEC", "there is no module no_such_module"),
        ("json:SPEC", "module json has no SPEC"),
        ("json:dumps", "not a StageSpec"),
    ):
        with pytest.raises(BadInput, match=reason):
            stage_spec(path)
    for check in (writer_class, check_kind):
        with pytest.raises(BadInput, match="there is no module no_such_module"):
            check("no_such_module:Thing")
    with pytest.raises(BadInput, match="not a subclass"):
        writer_class("json:dumps")
    refused = one_line(capipe("no_such_module:SPEC", "--out", tmp_path / "out", code=2))
    assert "there is no module no_such_module" in refused
