"""Training runs and evaluations through the CLI, for result tables; finished ones are not repeated."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capipe.trainer.log import read_steps

ENGINE_READY = "engine ready after"
COST = "cost.json"  # CPU seconds of the command that finished a run


def capipe(log: Path, *words: str) -> float:
    """Run a command to its end with its output in ``log``; returns the CPU seconds of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a", encoding="utf-8") as file:
        subprocess.run([sys.executable, "-m", "capipe.pipeline", *words], check=True, stdout=file, stderr=file)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def working_seconds(command: Sequence[str], out: Path, **environment: str) -> tuple[float, float]:
    """Seconds of a command from its engine being ready to the last commit in ``out``, and all its other seconds."""
    started, ready, said = time.time(), 0.0, []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if ENGINE_READY in line:
                ready = time.time()
    whole = time.time() - started
    if process.returncode or not ready:
        sys.exit(f"{' '.join(command[:4])} ended with {process.returncode}:\n{''.join(said[-15:])}")
    working = (out / "_capipe/manifest.jsonl").stat().st_mtime - ready
    return working, whole - working


def train(recipe: str, out: Path, steps: int | None = None, sets: Sequence[str] = ()) -> Path:
    """Last checkpoint of a ``capipe train`` of ``recipe`` with overrides; ``steps`` replaces the recipe's."""
    if not (out / COST).exists():
        wanted = [*([] if steps is None else [f"steps={steps}"]), *sets]
        options = [word for override in wanted for word in ("--set", override)]
        spent = capipe(out.with_suffix(".log"), "train", recipe, "--out", str(out), *options)
        (out / COST).write_text(json.dumps({"processor_seconds": spent}), encoding="utf-8")
    return max(path for path in out.glob("step-*") if path.is_dir())


def cost(out: Path) -> dict[str, float]:
    """Cost of a run of :func:`train`: steps, and CPU seconds from start to end."""
    spent = json.loads((out / COST).read_text(encoding="utf-8"))["processor_seconds"]
    return {"steps": len(updates(out)), "processor seconds": round(spent)}


def updates(run: Path) -> list[dict[str, Any]]:
    """Logged training steps of a run, without validations."""
    return [dict(entry) for entry in read_steps(run) if "reward" in entry]


def evaluate(part: str, model: str, out: Path, *options: str) -> None:
    """A ``capipe eval`` of ``model`` on images PART-shards by questions PART-quiz, under the hold-out reader."""
    if not (out / "report.json").exists():
        engines = ("--engine", "transformers", "--reader-engine", "transformers")
        held = ("--shards", f"{part}-shards", "--questions", f"{part}-quiz", "--reader", "tiny/holdout-reader")
        capipe(out.with_suffix(".log"), "eval", *held, "--out", str(out), "--model", model, *engines, *options)


def captioner(out: Path) -> dict[str, Any]:
    """Metrics of the captioner's first prompt in an evaluation's report."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    system: dict[str, Any] = report["systems"][0]
    return system
