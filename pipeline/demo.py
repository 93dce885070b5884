"""`capipe demo`: the chain so far, on rendered pictures and the bundled models, by the commands a user types."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import BadInput, RunFailed
from ..manifests.artifact import Artifact
from ..manifests.shards import RowReader, expand
from ..manifests.status import QuestionStatus
from ..models.tiny.corpus import write_corpus
from ..trainer.figures import Report
from .status import State, state

QUICK = "transformers"  # for the small quiz steps: it is up at once
MARK = ".capipe-demo"  # in folders this command made, which alone it clears
SEED = 20


@dataclass(frozen=True)
class Shown:
    """A picture of the demo with what was said about it."""

    file: str
    original: str
    short: str
    dense: str


def run_demo(out: Path, images: int, engine: str, say: Callable[[str], None]) -> Path:
    """Render, ingest, annotate, write and screen questions, evaluate, verify; returns the report's path.

    Raises CapipeError where a step fails.
    """
    _clear(out)
    corpus, shards, captions = out / "corpus", out / "shards", out / "captions"
    questions, evaluation = out / "questions", out / "eval"
    say(f"1/6 render {images} held-out scenes into {corpus}")
    write_corpus(corpus, images, "heldout", SEED)
    say(f"2/6 ingest them into {shards}")
    _capipe("ingest", corpus, "--out", shards, "--shard-size", max(1, images // 5))
    say(f"3/6 annotate them: two prompts an image, engine {engine}")
    _capipe(
        *("annotate", "--shards", shards, "--out", captions, "--model", "tiny/captioner", "--engine", engine),
        *("--prompt", "plain", "--prompt", "dense", "--max-tokens", 256, "--pack"),
    )
    few, quick = ("--shards", shards / "00000.tar"), ("--engine", QUICK if engine == "auto" else engine)
    say("4/6 write and screen quiz questions about the first shard's pictures")
    _capipe("qa", *few, "--out", questions, "--model", "tiny/teacher", *quick)
    say("5/6 evaluate the captioner: how well does a reader answer them from its captions alone?")
    _capipe(
        *("eval", *few, "--questions", questions, "--out", evaluation, "--model", "tiny/captioner", *quick),
        *("--reader", "tiny/holdout-reader", "--prompt", "plain", "--prompt", "dense", "--samples", 2),
        *("--max-tokens", 256),
    )
    say("6/6 verify")
    for artifact in (shards, captions, questions / "written", questions / "screened", evaluation / "graded"):
        _capipe("verify", artifact)
    report = out / "report.md"
    text = _report(images, state(str(captions)), list(_show(shards, captions, 3)), _quiz(questions, evaluation))
    report.write_text(text, encoding="utf-8")
    return report


def _quiz(questions: Path, evaluation: Path) -> list[str]:
    """What the quiz steps gave, in lines."""
    artifact = Artifact.open(str(questions / "screened"))
    entries = [e for shard in artifact.committed() for row in artifact.read_rows(shard) for e in row["questions"]]
    kept = [entry for entry in entries if entry["status"] == QuestionStatus.OK]
    report = Report.from_dict(json.loads((evaluation / "report.json").read_text(encoding="utf-8")))
    accuracies = [f"{s.name} {s.quiz.accuracy.value:.2f}" for s in report.systems if s.quiz.accuracy is not None]
    shown = [f"{entry['question']} ({', '.join(entry['options'])})" for entry in kept[:2]]
    return [
        f"{len(kept)} of {len(entries)} questions kept, e.g. {' '.join(shown)}",
        f"quiz accuracy: {', '.join(accuracies)}",
    ]


def _clear(out: Path) -> None:
    """Start with an empty folder, but never clear one that this command did not make."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise BadInput(f"{out}: the folder holds something that is no earlier demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _capipe(*arguments: Any) -> None:
    """Run a command of ours as a user would, in a process of its own."""
    words = [str(argument) for argument in arguments]
    print("$ capipe", " ".join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "capipe.pipeline", *words]).returncode
    if code:
        raise RunFailed(f"capipe {words[0]} ended with exit code {code}; its own message is above")


def _show(shards: Path, captions: Path, count: int) -> Iterator[Shown]:
    """The first pictures of the corpus with their captions."""
    artifact = Artifact.open(str(captions))
    pairs = (
        pair
        for shard in expand(str(shards))
        for pair in zip(RowReader(shard), artifact.read_rows(shard.name), strict=True)
    )
    for number, (source, row) in enumerate(islice(pairs, count)):
        texts = {caption["name"]: caption["text"] for caption in row["captions"]}
        yield Shown(f"corpus/{number:06d}.jpg", source.text or "", texts.get("plain", ""), texts.get("dense", ""))


def _report(images: int, found: State, shown: list[Shown], quiz: list[str]) -> str:
    rows = "\n".join(f"| {status} | {count} |" for status, count in sorted(found.rows.items()))
    parts = [
        "# capipe demo",
        f"{images} rendered scenes were ingested, captioned by `tiny/captioner` and verified.",
        f"| status | rows |\n|---|---|\n{rows}",
        f"`captions/` has {found.shards} shards, {found.bytes:,} bytes: tars with images and captions, and Parquet.",
    ]
    parts += [*quiz, "All figures of the quiz: [eval/report.md](eval/report.md)"]
    for sample in shown:
        parts.append(
            f"![]({sample.file})\n\n- alt text: {sample.original}\n- plain: {sample.short}\n- dense: {sample.dense}"
        )
    return "\n\n".join(parts) + "\n"


def lines(report: Path) -> list[str]:
    """What the demo ends with: three captions, the quiz in two lines, and where everything is."""
    out = report.parent
    texts = [f"  {s.file}: {s.dense}" for s in _show(out / "shards", out / "captions", 3)]
    quiz = _quiz(out / "questions", out / "eval")
    return ["three captions:", *texts, *quiz, f"report: {report}", f"shards: {out / 'captions'}"]
