"""`capipe demo`: the chain, on rendered pictures and the bundled models, by the commands a user types."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, RunFailed
from ..models.tiny.corpus import write_corpus
from ..trainer.checkpoint import folder_of
from .demo_report import Places, write_report

QUICK = "transformers"  # for the small steps: it is up at once
MARK = ".capipe-demo"  # in folders this command made, which alone it clears
SEED = 20
SCENES = 100  # to train on, at most
# The recipe's schedule is of 40 steps; these few keep their rate to the end.
FEW_STEPS = ("optimizer.schedule=constant", "optimizer.lr=2e-4", "optimizer.warmup=3")
READER, GALLERY_CLIP = "tiny/holdout-reader", "tiny/eval-clip"  # never a reward, never a filter
KEEP = "itm_score_min > 0.5"
Part = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Demo:
    """What was asked for, and each part of the chain."""

    at: Places
    images: int
    engine: str
    train_steps: int

    @property
    def quick(self) -> tuple[str, str]:
        """The engine of the small steps."""
        return "--engine", QUICK if self.engine == "auto" else self.engine

    @property
    def few(self) -> tuple[str, Path]:
        """The first shard, which the quiz is about."""
        return "--shards", self.at.shards / "00000.tar"

    def parts(self) -> list[Part]:
        """The chain in order, each part with what is said before it."""
        at, steps = self.at, self.train_steps
        scenes = min(SCENES, self.images)
        training: list[Part] = [
            (f"render {scenes} other scenes to train on, ingest them, write and screen questions", self.train_data),
            (f"train: {steps} steps in which captions earn what a reader can answer from them", self.train),
            ("evaluate the trained captioner: the held-out pictures, a reader that it was not trained by", self.after),
        ]
        return [
            (f"render {self.images} held-out scenes into {at.corpus}", self.render),
            (f"ingest them into {at.shards}", self.ingest),
            (f"annotate them: two prompts an image, engine {self.engine}", self.annotate),
            ("write and screen quiz questions about the first shard's pictures", self.ask),
            ("evaluate the captioner: how well does a reader answer them from its captions alone?", self.before),
            *(training if steps else []),
            ("mark pictures that repeat others", self.dedup),
            ("filter: keep captions of which CLIP and a matching model believe every sentence", self.filter),
            (f"export what is kept to {at.final}, with a card and indexes", self.export),
            ("verify", self.verify),
        ]

    def render(self) -> None:
        write_corpus(self.at.corpus, self.images, "heldout", SEED)

    def ingest(self) -> None:
        _capipe("ingest", self.at.corpus, "--out", self.at.shards, "--shard-size", max(1, self.images // 5))

    def annotate(self) -> None:
        _capipe(
            *("annotate", "--shards", self.at.shards, "--out", self.at.captions, "--model", "tiny/captioner"),
            *("--engine", self.engine, "--prompt", "plain", "--prompt", "dense", "--max-tokens", 256, "--pack"),
        )

    def ask(self) -> None:
        _capipe("qa", *self.few, "--out", self.at.questions, "--model", "tiny/teacher", *self.quick)

    def before(self) -> None:
        self._evaluate(self.at.evaluation, "tiny/captioner", "--prompt", "dense")

    def train_data(self) -> None:
        corpus, shards, questions = self.at.train_corpus, self.at.train_shards, self.at.train_questions
        write_corpus(corpus, min(SCENES, self.images), "train", SEED + 1)
        _capipe("ingest", corpus, "--out", shards)
        _capipe("qa", "--shards", shards, "--out", questions, "--model", "tiny/teacher", *self.quick)

    def train(self) -> None:
        settings = (
            f"data.shards={self.at.train_shards}",
            f"data.questions={self.at.train_questions}",
            "validation=null",  # the part after this one is
            f"steps={self.train_steps}",
            f"save_every={self.train_steps}",
            *FEW_STEPS,
        )
        _capipe("train", "tiny-caprl", "--out", self.at.run, *(word for each in settings for word in ("--set", each)))

    def after(self) -> None:
        self._evaluate(self.at.trained_evaluation, folder_of(self.at.run, self.train_steps), "--no-controls")

    def dedup(self) -> None:
        _capipe("dedup", "--shards", self.at.shards, "--out", self.at.marks)

    def filter(self) -> None:
        _capipe(
            *("filter", "--shards", self.at.shards, "--captions", self.at.captions, "--out", self.at.filtered),
            *("--marks", self.at.marks / "marked", "--clip", "tiny/clip", "--itm", "tiny/itm", "--keep", KEEP),
        )

    def export(self) -> None:
        final = ("--format", "webdataset", "--title", "Rendered scenes", "--license", "apache-2.0")
        _capipe("export", self.at.filtered / "shards", *final, "--out", self.at.final)

    def verify(self) -> None:
        at = self.at
        artifacts = [at.shards, at.captions, at.questions / "written", at.questions / "screened"]
        artifacts += [at.evaluation / "graded", at.filtered / "scores", at.filtered / "shards", at.final]
        if self.train_steps:
            artifacts += [at.train_shards, at.train_questions / "screened", at.trained_evaluation / "graded"]
        for artifact in artifacts:
            _capipe("verify", artifact)

    def _evaluate(self, out: Path, model: str | Path, *more: str) -> None:
        _capipe(
            *("eval", *self.few, "--questions", self.at.questions, "--out", out, "--model", model, *self.quick),
            *(
                "--reader",
                READER,
                "--clip",
                GALLERY_CLIP,
                "--prompt",
                "plain",
                "--samples",
                2,
                "--max-tokens",
                256,
                *more,
            ),
        )


def run_demo(out: Path, images: int, engine: str, train_steps: int, say: Callable[[str], None]) -> Path:
    """Render, ingest, annotate, ask, evaluate, train, mark repeats, filter, export, verify; returns the report's path.

    Without ``train_steps`` nothing is trained. Raises CapipeError where a step fails.
    """
    _clear(out)
    demo = Demo(Places(out), images, engine, train_steps)
    parts = demo.parts()
    for number, (title, part) in enumerate(parts, start=1):
        say(f"{number}/{len(parts)} {title}")
        part()
    return write_report(demo.at, images)


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
