"""Options of engines from the command line to places, fingerprints and chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.manifests.artifact import Artifact
from capipe.models.engines.loading import EngineConfig
from capipe.pipeline.chain.identity import meaning
from capipe.pipeline.chain.validate import check_chain
from capipe.pipeline.commands.gpus import gpu_groups
from capipe.pipeline.commands.options import shared as o
from capipe.pipeline.commands.options.groups import settings
from capipe.pipeline.commands.options.key_values import FIELDS
from capipe.pipeline.jobs.rows.engine import EngineSetup
from capipe.pipeline.runners.placement import Placement
from capipe.pipeline.runners.ray.cluster import ClusterSize, RayCluster, cluster_size

from ..chains import chain_of
from ..conftest import capipe, one_line, table

MODEL = "tiny/captioner"


def test_a_second_model_can_be_given_each_setting_of_the_first() -> None:
    apart = {"gpus", "engine_arg", "template_arg"}  # one for both models; written by keys of their own
    assert set(settings(o.EngineOptions())) - apart == {key.replace("-", "_") for key in FIELDS}
    named = o.EngineOptions(gpu_memory=0.5, adapter="a", engine_arg=["block-size=16"]).engine_settings()
    del named["decode_workers"]  # of the stage, not of its engine
    config = EngineConfig("vllm", MODEL, **named)
    assert (config.gpu_memory_utilization, config.adapter, config.engine_args) == (0.5, "a", {"block_size": 16})


def test_gpus_are_grouped_and_what_is_left_over_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_groups(["0", "1", "2", "3"], 1) == ("0", "1", "2", "3")
    assert gpu_groups(["0", "1", "2", "3"], 2) == ("0,1", "2,3")
    assert capsys.readouterr().err == ""
    assert gpu_groups(["0", "1", "4", "5", "6"], 2) == ("0,1", "4,5")
    assert "--tensor-parallel 2: GPU 6 left over" in capsys.readouterr().err


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(BadInput, match="--tensor-parallel 4: there is only GPU 0, 1"):
        o.RunOptions().placement("vllm", "0,1", 4)
    with pytest.raises(BadInput, match="--tensor-parallel 2: there is no GPU"):
        o.RunOptions().placement("vllm", "none", 2)
    assert o.RunOptions().placement("vllm", "0,1,2,3", 2) == Placement(("0,1", "2,3"))


def test_on_a_cluster_each_worker_has_so_many_of_one_machine() -> None:
    assert cluster_size(RayCluster("a:1", gpus_each=2), [8, 8, 3]) == ClusterSize(9, 2, 3)
    assert cluster_size(RayCluster("a:1", workers=3, gpus_each=4), [8, 8]) == ClusterSize(3, 4, 2)
    assert cluster_size(RayCluster("a:1"), [8, 0]) == ClusterSize(8, 1, 2)
    assert cluster_size(RayCluster("a:1", gpu=False), [8, 8]) == ClusterSize(2, 0, 2)
    assert cluster_size(RayCluster("a:1"), [0, 0]) == ClusterSize(2, 0, 2)
    with pytest.raises(BadInput, match=r"--tensor-parallel 4: no machine of the cluster has so many GPUs \(most: 2\)"):
        cluster_size(RayCluster("a:1", gpus_each=4), [2, 2])


def semantic(**more: Any) -> dict[str, Any]:
    return EngineSetup(EngineConfig("auto", MODEL, **more), decode_workers=1).semantic()


def test_fingerprints_cover_what_changes_rows_and_stay_where_nothing_is_given() -> None:
    plain = semantic()
    assert {"template_args", "engine_args", "adapter"}.isdisjoint(plain)
    assert semantic(room=700, max_model_len=900, engine_args={"block_size": 16, "enforce_eager": True}) == plain
    assert semantic(engine_args={"quantization": "fp8", "block_size": 16}) == {
        **plain,
        "engine_args": {"quantization": "fp8"},
    }
    thinking = EngineSetup(EngineConfig("auto", MODEL, template_args={"enable_thinking": False}))
    assert thinking._more() == {"template_args": {"enable_thinking": False}}  # a template that reads none refuses it


def test_an_adapter_is_known_by_its_content(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = []
    for name, content in (("one", b"a"), ("other", b"a"), ("third", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        found.append(semantic(adapter=str(tmp_path / name))["adapter"])
    assert found[0] == found[1] != found[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture."""
    at = tmp_path_factory.mktemp("one")
    capipe("render", "--out", at / "scenes", "--images", 1)
    capipe("ingest", at / "scenes", "--out", at / "shards")
    return at / "shards"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--engine-arg", "block_size"], "--engine-arg 'block_size': write key=value"),
        (["--engine-arg", "block_sise=16"], "does not know: block_sise (did you mean block_size?)"),
        (["--engine-arg", "dtype=half"], "engine argument dtype: capipe sets it itself; give --dtype"),
        (["--engine-arg", "block_size=16", "--engine", "transformers"], "these are vLLM's"),
        (["--tensor-parallel", "2", "--gpus", "none"], "--tensor-parallel 2: there is no GPU"),
        (["--template-arg", "=x"], "--template-arg '=x': write key=value"),
        (["--adapter", "nowhere"], "--adapter nowhere: no such folder"),
    ],
)
def test_what_annotate_refuses_before_it_begins(shards: Path, tmp_path: Path, words: list[str], reason: str) -> None:
    pytest.importorskip("vllm")
    common = ("annotate", "--shards", shards, "--out", tmp_path / "out", "--model", MODEL)
    assert reason in one_line(capipe(*common, *words, code=2))
    assert not (tmp_path / "out").exists()


STAGE: dict[str, Any] = {"stage": "annotate", "inputs": {"shards": {"path": "shards"}}}


def annotating(tmp_path: Path, **config: Any) -> Any:
    return chain_of(tmp_path, stages={"a": {**STAGE, "config": {"model": MODEL, **config}}})


def test_a_recipe_may_have_a_mapping_or_the_command_lines_words(tmp_path: Path) -> None:
    written = {"engine-arg": {"quantization": "fp8", "hf_overrides": {"x": 1}, "block-size": 16}}
    mapped = annotating(tmp_path, **written, **{"template-arg": {"enable_thinking": False}}).stages[0]
    assert mapped.config["engine-arg"] == ['quantization="fp8"', "hf_overrides.x=1", "block-size=16"]
    words = {"engine-arg": ["block_size=32", "hf_overrides.x=1", "quantization=fp8"]}
    listed = annotating(tmp_path, **words, **{"template-arg": "enable_thinking=false"}).stages[0]
    assert meaning(mapped) == meaning(listed)
    assert meaning(mapped)["engine-arg"] == {"engine_args": {"quantization": "fp8", "hf_overrides": {"x": 1}}}
    assert meaning(annotating(tmp_path, **{"engine-arg": ["block_size=32"], "tensor-parallel": 2}).stages[0]) == (
        meaning(annotating(tmp_path).stages[0])
    )


def test_a_second_models_options_hang_on_its_own_part_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "tiny/teacher", "screen-arg": {"gpu-memory": 0.3, "dtype": "float32"}}
    stages = {"q": {"stage": "qa", "inputs": {"shards": {"path": "shards"}}, "config": given}}
    stage = chain_of(tmp_path, stages=stages).stages[0]
    assert meaning(stage)["screen-arg"] == {"dtype": "float32"}
    written, screened = stage.command.spec.parts
    assert not written.depends_on("screen-arg") and screened.depends_on("screen-arg")
    assert written.depends_on("engine-arg") and not written.depends_on("reader-mode")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"engine-arg": {"block_sise": 1}}, "did you mean block_size?"),
        ({"engine-arg": ["x"]}, "write key=value"),
        ({"adapter": "/no/such/adapter"}, "--adapter /no/such/adapter: no such folder; download the adapter"),
        ({"tensor-parallel": 2, "engine": "transformers"}, "--tensor-parallel 2: is for vLLM"),
    ],
)
def test_a_chains_checks_see_them(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    pytest.importorskip("vllm")
    found = check_chain(annotating(tmp_path, **config))
    assert any(reason in line for line in [*found.problems, *found.absent])


def test_a_chains_training_may_have_its_own_pixels(tmp_path: Path) -> None:
    inputs = {"shards": {"path": "shards"}, "questions": {"path": "qa"}}
    config = {"recipe": "tiny-caprl", "max-pixels": 6272}
    stages = {"t": {"stage": "train", "inputs": inputs, "config": config}}
    stage = chain_of(tmp_path, stages=stages).stages[0]
    assert stage.recipe is not None and stage.recipe.max_pixels == 6272
    assert meaning(stage)["recipe"]["max_pixels"] == 6272
    del config["max-pixels"]
    assert "max_pixels" not in meaning(chain_of(tmp_path, stages=stages).stages[0])["recipe"]


@pytest.fixture(scope="module")
def quizzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("options")
    capipe("render", "--out", at / "scenes", "--images", 4, "--split", "heldout")
    capipe("ingest", at / "scenes", "--out", at / "shards")
    teacher = ("--model", "tiny/teacher", "--engine", "transformers", "--per-image", 2)
    screen = ("--screen-arg", "dtype=float32", "--screen-arg", "max-model-len=900", "--reader-mode", "sampled")
    capipe("qa", "--shards", at / "shards", "--out", at / "qa", *teacher, *screen)
    return at


def test_who_screens_has_options_of_its_own(quizzed: Path) -> None:
    screened = Artifact.open(str(quizzed / "qa/screened")).config["semantic"]
    written = Artifact.open(str(quizzed / "qa/written")).config["semantic"]
    assert (written["dtype"], screened["dtype"]) == ("auto", "float32")
    assert screened["screen"]["reader"]["mode"] == "sampled"
    assert any(entry["with_image"] for row in table(quizzed / "qa/screened") for entry in row["questions"])
    common = ("qa", "--shards", quizzed / "shards", "--out", quizzed / "none", "--engine", "transformers")
    asks = ("--model", "tiny/teacher")
    line = one_line(capipe(*common, *asks, "--screen-arg", "gpu-memory=2", code=2))
    assert "--screen-arg: gpu_memory_utilization must be above 0 and at most 1, not 2" in line
    assert "nobody screen" in one_line(capipe(*common, *asks, "--screen", "none", "--screen-arg", "a=1", code=2))
    imported = ("--import", "set.jsonl", "--screen-model", "tiny/teacher", "--template-arg", "a=1")
    assert "give it to who screens, by --screen-arg" in one_line(capipe(*common, *imported, code=2))
    assert not (quizzed / "none").exists()


def test_a_reader_has_options_of_its_own(quizzed: Path) -> None:
    out = quizzed / "eval"
    common = ("eval", "--shards", quizzed / "shards", "--questions", quizzed / "qa/written", "--engine", "transformers")
    reads = ("--reader", "tiny/reader", "--reader-arg", "dtype=float32", "--reader-mode", "sampled")
    captions = ("--model", MODEL, "--samples", 1, "--max-tokens", 60)
    capipe(*common, *reads, *captions, "--out", out)
    graded = Artifact.open(str(out / "graded")).config["semantic"]
    assert graded["dtype"] == "float32" and graded["reader"]["mode"] == "sampled"
    assert Artifact.open(str(out / "captions")).config["semantic"]["dtype"] == "auto"
    assert json.loads((out / "report.json").read_text())
    given = ("--captions", out / "captions", "--out", quizzed / "none", "--adapter", "x")
    assert "give it to the reader, by --reader-arg" in one_line(capipe(*common, *reads[:2], *given, code=2))
    wrong = ("--reader-arg", "max-pixels=9")
    line = one_line(capipe(*common, *reads[:2], *captions, *wrong, "--out", quizzed / "none", code=2))
    assert "--reader-arg max-pixels=9: this model reads text alone" in line


@pytest.mark.slow
def test_vllm_gets_its_arguments(quizzed: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    common = ("annotate", "--shards", quizzed / "shards", "--model", MODEL, "--max-tokens", 60)
    engine = ("--engine", "vllm", "--engine-arg", "block_size=64", "--engine-arg", "max_num_batched_tokens=1024")
    capipe(*common, "--out", tmp_path / "vllm", *engine)
    capipe(*common, "--out", tmp_path / "plain", "--engine", "transformers")
    texts = [[row["captions"][0]["text"] for row in table(tmp_path / name)] for name in ("vllm", "plain")]
    assert texts[0] == texts[1] and all(texts[0])
