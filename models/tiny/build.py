"""Train a bundled model from scratch: ``python -m capipe.models.tiny.build captioner --seed 0 --minutes 50``.

Checkpoints go to ``.checkpoints/``, from which ``--resume`` goes on; the model's folder is exported every few minutes,
so that a long run is usable before its end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from . import BUNDLED, resolve
from .corpus import samples
from .evaluate import caption, grades_of
from .export import build_processor, export_folder
from .grade import total
from .prompts import DENSE
from .tokenizer import build_tokenizer
from .train import Plan, Trainer

SAVE_EVERY = 120.0  # seconds
EXPORT_EVERY = 300.0
LOOKED_AT = 100  # held-out scenes captioned at every export


def build(plan: Plan, out: Path, checkpoint: Path, resume: bool) -> Trainer:
    """Train as ``plan`` says and export to ``out``. Raises FileNotFoundError where there is nothing to resume."""
    trainer = Trainer(plan, build_tokenizer(plan.seed))
    if resume:
        trainer.load(checkpoint)
        say(f"resumed at step {trainer.progress.step}, {trainer.progress.seconds:.0f} s")
    saved = exported = trainer.progress.seconds
    for progress in trainer.run(say):
        if progress.seconds - saved > SAVE_EVERY:
            trainer.save(checkpoint)
            saved = progress.seconds
        if progress.seconds - exported > EXPORT_EVERY:
            export_folder(trainer.model, trainer.tokenizer, out)
            exported = progress.seconds
            say(f"exported step {progress.step} to {out}: {quality(trainer)}")
    trainer.save(checkpoint)
    export_folder(trainer.model, trainer.tokenizer, out)
    say(f"done: {trainer.progress.step} steps in {trainer.progress.seconds / 60:.1f} minutes, exported to {out}")
    return trainer


def quality(trainer: Trainer, count: int = LOOKED_AT) -> str:
    """How good the greedy dense captions of ``count`` held-out scenes are, in a line."""
    corpus = list(samples(count, "heldout", seed=2))
    processor = build_processor(trainer.tokenizer)
    grades = grades_of(corpus, caption(trainer.model, processor, [each.image for each in corpus], DENSE[0]))
    whole, exact = total(grades), sum(each.exact for each in grades) / count
    return f"precision {whole.precision():.4f} recall {whole.recall():.4f} exact {exact:.2f} of {count} scenes"


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BUNDLED)
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long; learning rates follow the clock")
    length.add_argument("--steps", type=int, help="train so many steps")
    parser.add_argument("--out", type=Path, help="the folder to write (default: the bundled one)")
    parser.add_argument("--checkpoints", type=Path, default=Path(".checkpoints"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_arguments(arguments)
    plan = Plan(seed=given.seed, minutes=given.minutes)
    if given.steps is not None:
        plan = Plan(seed=given.seed, steps=given.steps)
    out = given.out or Path(resolve(f"tiny/{given.model}"))
    build(plan, out, given.checkpoints / f"tiny-{given.model}-{given.seed}.pt", given.resume)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
