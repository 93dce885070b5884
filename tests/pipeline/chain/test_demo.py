"""The demo's chain: final captions by the captioner that was just trained, or by the untrained one without training."""

from __future__ import annotations

from pathlib import Path

from capipe.pipeline.chain.demo import RECIPE, TRAINING, overrides
from capipe.pipeline.chain.plan import arguments
from capipe.pipeline.chain.recipe import load_chain_recipe
from capipe.pipeline.chain.validate import check_chain
from capipe.stages.annotate.prompts import NAMED
from capipe.trainer.recipe import load_recipe


def commands(train_steps: int, out: Path) -> dict[str, str]:
    """The chain's command lines by stage, in its order."""
    chain = load_chain_recipe(RECIPE, overrides(12, "transformers", train_steps))
    checks = check_chain(chain)
    assert not checks.problems and not checks.absent
    return {stage.name: " ".join(arguments(chain, stage, out)) for stage in chain.stages}


def test_the_trained_captioner_writes_the_final_captions(tmp_path: Path) -> None:
    lines = commands(3, tmp_path)
    assert set(TRAINING) < set(lines) and list(lines).index("train") < list(lines).index("captions")
    assert f"--model {tmp_path}/train/step-000003" in lines["captions"]
    assert f"--captions {tmp_path}/captions" in lines["filtered"]
    assert f"export {tmp_path}/filtered/shards" in lines["final"]


def test_the_first_prompt_is_that_of_the_training(tmp_path: Path) -> None:
    """The first healthy caption of a row is the one that is exported."""
    lines = commands(3, tmp_path)
    assert "--prompt plain --prompt dense" in lines["captions"] and "--prompt plain" in lines["eval-trained"]
    assert load_recipe(Path("tiny-caprl")).prompt == NAMED["plain"]


def test_without_training_the_bundled_captioner_writes_them(tmp_path: Path) -> None:
    lines = commands(0, tmp_path)
    assert set(TRAINING).isdisjoint(lines) and "--model tiny/captioner" in lines["captions"]
    assert [lines[name].count("--model") for name in ("captions", "eval")] == [1, 1]
