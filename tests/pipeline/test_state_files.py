"""Files that tell where a chain or a training run stands, in a folder with somebody else's links and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from capipe.errors import ArtifactMismatch, BadInput
from capipe.pipeline.chain.lock import LOCK, locked
from capipe.pipeline.inspect.chain_state import FILE, ChainState, StageState, load_chain, save_chain
from capipe.pipeline.jobs.eval import write_report
from capipe.pipeline.jobs.train import _claim, _look
from capipe.trainer.checkpoint import FACTS, Facts, checkpoints, save
from capipe.trainer.evaluation.results import EvaluationReport
from capipe.trainer.log import RunLog


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    file = tmp_path / "outside"
    file.write_text("kept")
    return file


def chain() -> ChainState:
    return ChainState("r", "", "", [StageState("a", "ingest", "a", artifacts=["a/shards"])], ["a"])


def test_a_chains_state_is_put_in_place_through_no_link(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "chain"
    folder.mkdir()
    for name in (FILE, f"{FILE}.partial", f".{FILE}.0123456789abcdef.partial"):
        (folder / name).symlink_to(outside)
    save_chain(folder, chain())
    loaded = load_chain(folder)
    assert loaded is not None and loaded.stages == chain().stages
    assert outside.read_text() == "kept" and not (folder / FILE).is_symlink()
    assert not (folder / f".{FILE}.0123456789abcdef.partial").is_symlink()
    (folder / LOCK).symlink_to(outside)
    with pytest.raises(BadInput, match="a symbolic link"), locked(folder, print):
        pass
    assert outside.read_text() == "kept"


@pytest.mark.parametrize("place", ["../x", "/tmp/x", "a/../../x", "..", "", "a\\b", "zip::x", 5, None])
@pytest.mark.parametrize("key", ["out", "artifacts", "made"])
def test_a_chains_state_names_folders_of_its_own(tmp_path: Path, key: str, place: object) -> None:
    save_chain(tmp_path, chain())
    state = json.loads((tmp_path / FILE).read_text())
    if key == "made":
        state["made"] = [place]
    else:
        state["stages"][0][key] = place if key == "out" else [place]
    (tmp_path / FILE).write_text(json.dumps(state))
    with pytest.raises(BadInput, match=r"chain\.json: not a chain's state"):
        load_chain(tmp_path)


@pytest.mark.parametrize("place", ["./captions", "captions/", "a b/c"])
def test_a_chains_folders_are_called_as_recipes_call_them(tmp_path: Path, place: str) -> None:
    state = chain()
    state.stages[0].out = place
    save_chain(tmp_path, state)
    loaded = load_chain(tmp_path)
    assert loaded is not None and loaded.stages[0].out == place


def test_a_training_runs_files_are_put_in_place_through_no_link(tmp_path: Path, outside: Path) -> None:
    out, victim = tmp_path / "run", tmp_path / "victim"
    out.mkdir()
    victim.mkdir()
    (victim / FACTS).write_text("kept")
    (out / ".run.json.0123456789abcdef.partial").write_text("{")
    assert _look(out, {"a": 1}, False) is None  # of one that was killed at its start
    for name in ("run.json", "run.partial"):
        (out / name).symlink_to(outside)
    for name in ("step-000001", "step-000002.partial"):
        (out / name).symlink_to(victim)
    _claim(out, {"a": 1}, True)
    assert outside.read_text() == "kept" and json.loads((out / "run.json").read_text()) == {"a": 1}
    assert not (out / "step-000001").is_symlink()
    (out / "step-000003.partial").symlink_to(victim)
    (out / "step-000003").symlink_to(victim)

    def write(folder: Path) -> None:
        (folder / "model").write_text("m")

    save(out, Facts(3, "mark", {}), write, {"step.a": torch.ones(1)}, keep=1)
    save(out, Facts(4, "mark", {}), write, {"step.a": torch.ones(1)}, keep=1)
    assert [each.name for each in checkpoints(out)] == ["step-000004"]
    assert [each.name for each in victim.iterdir()] == [FACTS] and (victim / FACTS).read_text() == "kept"
    (out / "log").mkdir()
    (out / "log/steps.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="a symbolic link"):
        RunLog(out / "log", 0).step(0, {"loss": 1.0})
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_run_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactMismatch, match=r"run\.json: unreadable"):
        _look(tmp_path, {}, False)


def test_an_evaluations_report_is_put_in_place_through_no_link(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("report.json", "report.md"):
        (tmp_path / name).symlink_to(outside)
        monkeypatch.setattr(f"capipe.pipeline.jobs.eval.to_{'json' if name.endswith('n') else 'markdown'}", str)
    write_report(EvaluationReport, str(tmp_path))  # type: ignore[arg-type]  # what is written does not matter here
    assert outside.read_text() == "kept" and (tmp_path / "report.md").read_text() == str(EvaluationReport)
