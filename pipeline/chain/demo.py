"""`capipe demo`: the chain of ``recipes/tiny.yaml``, verification of all its artifacts, and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import Problems, RunFailed
from ...trainer.recipe_file import RECIPES
from ..commands.run_job import Exit
from ..inspect.chain_state import load_chain
from ..inspect.verify import verify
from ..report.page import write_report
from .command import checked, run_checked

RECIPE = RECIPES / "tiny.yaml"
SCENES = 100  # for training, at most
CAPTIONER = "tiny/captioner"  # writes the final captions if nothing is trained
TRAINING = ("train-pictures", "train-shards", "train-questions", "train", "eval-trained")


def overrides(images: int, engine: str, train_steps: int) -> list[str]:
    """Recipe overrides for the demo's options. Small stages use an engine with a fast start."""
    quick = "transformers" if engine == "auto" else engine
    small = ["questions", "eval", *(["train-questions", "eval-trained"] if train_steps else [])]
    sets = {
        "pictures.config.images": images,
        "shards.config.shard-size": max(1, images // 5),
        "captions.config.engine": engine,
        **{f"{name}.config.engine": quick for name in small},
    }
    if train_steps:
        sets |= {"train-pictures.config.images": min(SCENES, images)}
        sets |= {f"train.config.set.{key}": train_steps for key in ("steps", "save_every")}
    else:
        sets |= dict.fromkeys(TRAINING, "null")
        sets |= {"captions.inputs": "{shards: shards}", "captions.config.model": CAPTIONER}
    return [f"stages.{key}={value}" for key, value in sets.items()]


def run_demo(out: Path, images: int, engine: str, train_steps: int, say: Callable[[str], None]) -> tuple[int, Path]:
    """Run or resume the chain in ``out``; returns its exit code and the report's path, which exists if the code is 0.

    ``train_steps`` 0: no training, captions by the untrained captioner. Raises CapipeError, also if an artifact fails
    verification.
    """
    chain, absent = checked(RECIPE, overrides(images, engine, train_steps))
    if absent:
        raise Problems(absent)
    code = run_checked(chain, out)
    if code != Exit.OK:
        return code, out
    _verify(out, say)
    return code, Path(write_report(out))


def _verify(out: Path, say: Callable[[str], None]) -> None:
    """Verify all artifacts of the chain."""
    state = load_chain(out)
    assert state is not None
    artifacts = [out / folder for stage in state.stages for folder in stage.artifacts]
    for artifact in artifacts:
        if faults := verify(str(artifact)).faults:
            raise RunFailed(f"{artifact}: {len(faults)} faults: {faults[0]}; `capipe verify` lists them")
    say(f"verified: {len(artifacts)} artifacts, clean")
