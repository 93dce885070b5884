"""Chains whose artifacts are in a bucket; models, logs and loose images stay local."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.storage import Folder
from capipe.pipeline.chain.plan import arguments
from capipe.pipeline.chain.recipe import load_chain_recipe
from capipe.pipeline.inspect.chain_state import FILE, load_chain
from capipe.pipeline.inspect.verify import verify

from ..chains import PLAIN, written
from ..conftest import capipe, one_line


def files(url: str) -> dict[str, Any]:
    """Names, sizes and checksums of all committed files."""
    return {shard: record.files for shard, record in Artifact.open(url).committed().items()}


def test_where_the_stages_of_the_demo_write() -> None:
    chain = load_chain_recipe(Path("tiny")).stored_at("s3://bucket/demo")
    lines = {stage.name: arguments(chain, stage, Path("here")) for stage in chain.stages}
    local = {name for name, words in lines.items() if not words[-1].startswith("s3://bucket/demo/")}
    assert local == {"pictures", "train-pictures", "train"} and lines["train"][-1] == "here/train"
    assert "data.shards=s3://bucket/demo/train-shards" in lines["train"]
    captions = " ".join(lines["captions"])
    assert "--shards s3://bucket/demo/shards --model here/train/step-000012 " in captions
    assert "--shards here" not in captions and captions.endswith("--out s3://bucket/demo/captions")


def test_what_stays_local_is_refused_elsewhere(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, url = written(tmp_path), f"{s3}/{tmp_path.name}/chain"
    for words in (
        ["run", recipe, "--out", url],
        ["train", "tiny-caprl", "--out", url],
        ["render", "--out", url],
        ["report", ".", "--out", f"{url}/report.html"],
    ):
        said = one_line(capipe(*words, code=2))
        assert said.startswith(f"capipe: {url}") and "written to local disks alone" in said
    refused = {"there": "not a URL", "memory://x": "no store that every stage", "s3://bukket/x": "no bucket"}
    for store, reason in refused.items():
        assert reason in one_line(capipe("run", recipe, "--out", "out", "--artifacts", store, code=2))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["recipe.yaml"]


@pytest.mark.slow
def test_a_chain_in_a_bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are those of a local run, a change is followed, and another place is refused."""
    monkeypatch.chdir(tmp_path)
    recipe, url = written(tmp_path), f"{s3}/{tmp_path.name}/chain"
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path / "local")  # rows name their pictures' paths: the same ones in both
    capipe("run", recipe, "--out", "out")
    monkeypatch.chdir(tmp_path)
    words = ["run", recipe, "--out", "out", "--artifacts", f"{url}/"]
    capipe(*words)
    assert sorted(path.name for path in Path("out").iterdir()) == [".chain.lock", FILE, "pictures"]
    for name in ("shards", "marks/marked", "final"):
        assert files(f"{url}/{name}") == files(f"local/out/{name}"), name
    assert capipe(*words).stderr.count("done before") == 4
    shown = json.loads(capipe("status", url, "--json").stdout)
    assert [stage["state"] for stage in shown["chain"]["stages"]] == ["done"] * 4 and shown["complete"]
    state = load_chain("out")
    assert state == load_chain(url) and state is not None and state.store == url

    said = one_line(capipe("run", recipe, "--out", "out", code=2))
    assert f"this chain's artifacts are at {url}; give that as --artifacts" in said
    said = one_line(capipe("run", recipe, "--out", "local/out", "--artifacts", url, code=2))
    assert "this chain's artifacts are in it; leave --artifacts out" in said
    said = one_line(capipe("run", recipe, "--out", "another", "--artifacts", url, code=2))
    assert said.startswith(f"capipe: {url}/shards: holds something that this chain did not make")

    redone = capipe(*words, "--set", "stages.shards.config.shard-size=2")
    assert f"removing {url}/shards, which was made of something else" in redone.stderr
    assert len(files(f"{url}/shards")) == len(files(f"{url}/final")) == 4
    assert verify(f"{url}/final").faults == [] == verify(f"{url}/shards").faults


def test_an_output_that_was_removed_is_made_again(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{s3}/{tmp_path.name}/chain"
    stages = {name: stage for name, stage in PLAIN.items() if name in ("pictures", "shards")}
    recipe = written(tmp_path, stages)
    words = ["run", recipe, "--out", "out", "--artifacts", url]
    capipe(*words)
    folder = Folder(url)
    folder.remove("shards")
    assert "to do (its output is gone)" in capipe(*words, "--dry-run").stdout
    capipe(*words)
    assert len(files(f"{url}/shards")) == 2
