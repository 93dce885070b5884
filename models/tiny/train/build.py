"""Train a bundled model from scratch: ``python -m capipe.models.tiny.train.build captioner --seed 0 --minutes 50``.

Checkpoints go to ``.checkpoints/``, from which ``--resume`` goes on; the model is exported beside them every few
minutes, so that a long run is usable before its end, which bundles it (``bundle.py``). With ``--out`` it is exported to
that folder and not bundled.

A quiz model (reader or teacher) that is to learn something new, and the narrow captioner, go on from weights that are
there: ``python -m capipe.models.tiny.train.build teacher --from tiny/teacher --minutes 40``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ...bundled import NAMES, UNTRAINED, folder_of, resolve
from ...scorers.loading import ScorerConfig, load_scorer
from ..world.corpus import samples
from ..world.grade import total
from ..world.prompts import DENSE
from . import bundle
from .architectures import build_processor
from .dual_encoder import PATCHES
from .eval.captioner import caption, graded_captions
from .eval.plain_captioner import PlainCaptioner, plain_report
from .eval.reader import report
from .eval.scorers import detections, subjects
from .eval.yes_no import yes_no_report
from .quiz_models import GRADUATES, enrol
from .schedule import Progress, Schedule
from .texts.tokenizer import build_tokenizer
from .train_blip import BlipTrainer, recalls
from .train_captioner import CaptionerPlan, CaptionTrainer, Trainer
from .train_clip_itm import ClipItmPlan, ClipItmTrainer, ClipTrainer, ItmTrainer
from .train_narrow import NarrowPlan, NarrowTrainer
from .train_plain_captioner import PLAIN, PlainPlan, PlainTrainer
from .train_vgg import FeaturesPlan, FeaturesTrainer, accuracies, load_classifier

SAVE_EVERY = 120.0  # seconds
EXPORT_EVERY = 300.0
LOOKED_AT = 100  # held-out scenes for the evaluation at every export
ASKED_ABOUT = 20  # of them for the teacher, which is asked dozens of questions about each


class Training(Protocol):
    """Interface of all trainers."""

    progress: Progress

    def run(self, log: Callable[[str], None]) -> Iterator[Progress]: ...

    def export(self, folder: Path) -> None: ...

    def save(self, file: Path) -> None: ...

    def load(self, file: Path) -> None: ...


def build(trainer: Training, name: str, out: Path, checkpoint: Path, resume: bool) -> None:
    """Train to the end of the schedule and export to ``out``. Raises FileNotFoundError if ``resume`` finds no file."""
    if resume:
        trainer.load(checkpoint)
        say(f"resumed at step {trainer.progress.step}, {trainer.progress.seconds:.0f} s")
    saved = exported = trainer.progress.seconds
    for progress in trainer.run(say):
        if progress.seconds - saved > SAVE_EVERY:
            trainer.save(checkpoint)
            saved = progress.seconds
        if progress.seconds - exported > EXPORT_EVERY:
            trainer.export(out)
            exported = progress.seconds
            say(f"exported step {progress.step} to {out}: {quality(trainer, name, out)}")
    trainer.save(checkpoint)
    trainer.export(out)
    say(f"done: {trainer.progress.step} steps in {trainer.progress.seconds / 60:.1f} minutes, exported to {out}")


def quality(trainer: Training, name: str, out: Path) -> str:
    """Held-out metrics of the model, in one line."""
    if isinstance(trainer, CaptionTrainer):
        corpus = list(samples(LOOKED_AT, "heldout", seed=2))
        processor = build_processor(trainer.tokenizer)
        grades = graded_captions(
            corpus, caption(trainer.model, processor, [sample.image for sample in corpus], DENSE[0])
        )
        whole, exact = total(grades), sum(grade.exact for grade in grades) / LOOKED_AT
        return f"precision {whole.precision():.4f} recall {whole.recall():.4f} exact {exact:.2f} of {LOOKED_AT} scenes"
    if isinstance(trainer, BlipTrainer):
        return shares(recalls(str(out), LOOKED_AT, seed=2))
    if isinstance(trainer, ClipItmTrainer):
        scorer = load_scorer(ScorerConfig("itm" if name == "itm" else "clip", str(out)))
        by_kind = detections(scorer, subjects(LOOKED_AT, seed=2))
        return " ".join(f"{kind} {detection.auc['score']:.3f}" for kind, detection in by_kind.items()) + " (ROC AUC)"
    if isinstance(trainer, PlainTrainer):
        if not trainer.sees:
            return "the loss above is of captions it had not read"
        sampled = plain_report(PlainCaptioner(str(out)), LOOKED_AT, seed=2, sample=True)
        return shares(asdict(sampled))
    if isinstance(trainer, FeaturesTrainer):
        return shares(accuracies(load_classifier(str(out)), LOOKED_AT, seed=2))
    if name == "diffusion":
        from .train_diffusion import diffusion_report

        return shares(diffusion_report(str(out), LOOKED_AT, seed=2))
    if name == "teacher":
        return shares(asdict(asyncio.run(yes_no_report(str(out), ASKED_ABOUT, seed=2)))) + " (ROC AUC)"
    return shares(asdict(asyncio.run(report(str(out), LOOKED_AT))))


def shares(figures: dict[str, Any]) -> str:
    """The float metrics of a report, in one line."""
    return " ".join(f"{key} {value:.3f}" for key, value in figures.items() if isinstance(value, float))


def training_of(name: str, seed: int, length: dict[str, Any], start: str | None = None) -> Training:
    """The trainer of a bundled model at its first step; ``length``: ``minutes`` or ``steps``; ``start``: see enrol."""
    if name == "captioner":
        return Trainer(CaptionerPlan(seed=seed, **length), build_tokenizer(seed))
    if name == "narrow":
        return NarrowTrainer(NarrowPlan(seed=seed, **length), start)
    if name == "itm":
        return ItmTrainer(ClipItmPlan(seed=seed, **length))
    if name == "vgg":
        return FeaturesTrainer(FeaturesPlan(seed=seed, **length))
    if name == "blip":
        return BlipTrainer(ClipItmPlan(seed=seed, reading_steps=0, **length))
    if name == "diffusion":
        from .train_diffusion import DiffusionPlan, DiffusionTrainer

        return DiffusionTrainer(DiffusionPlan(seed=seed, **length))
    if name in PLAIN:
        trainer: PlainTrainer = PLAIN[name](PlainPlan(seed=seed, **length))
        return trainer
    if name in PATCHES:
        return ClipTrainer(name, ClipItmPlan(seed=seed, **length))
    return enrol(name, Schedule(seed=seed, **length), start)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=(*NAMES, *UNTRAINED))
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long; learning rates follow the clock")
    length.add_argument("--steps", type=int, help="train so many steps")
    parser.add_argument("--out", type=Path, help="the folder to write; the model is not bundled then")
    parser.add_argument("--checkpoints", type=Path, default=Path(".checkpoints"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="start from these weights (tiny/teacher, or a folder): quiz models and narrow only",
    )
    given = parser.parse_args(arguments)
    going_on = (*GRADUATES, "narrow")
    if given.start is not None and given.model not in going_on:
        parser.error(f"--from is for {', '.join(going_on)}: {given.model} is trained from scratch only")
    if given.out is not None and given.out.resolve() == folder_of(given.model):
        parser.error("--out: the bundled folder is written at the end, without --out")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    length = {"steps": options.steps} if options.steps is not None else {"minutes": options.minutes}
    start = None if options.start is None else resolve(options.start)
    trainer = training_of(options.model, options.seed, length, start)
    kept = options.checkpoints / f"tiny-{options.model}-{options.seed}"
    out = options.out or kept
    build(trainer, options.model, out, kept.with_name(f"{kept.name}.pt"), options.resume)
    if options.out is None:
        bundle.bundle(out, options.model, bundle.ROOT)
        say(bundle.report(options.model, bundle.ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
