"""CapRL's ablations at the bundled models' scale: what each reward makes of the same captioner in the same steps.

Each row is a `capipe train tiny-caprl` with the overrides below for each seed, then a `capipe eval` of its checkpoints
on held-out scenes at temperature 1 under the hold-out reader. Finished runs in --out are not repeated. The table has
each figure's mean over the seeds, and its standard deviation where there are several.

    python bench/ablations.py --data data/tiny --out runs/ablations
    python bench/ablations.py --model FOLDER --set optimizer.lr=5e-4 --rows "all q" true --seeds 0 1 2 --at 20 40
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from _runs import captioner, evaluate, train

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-caprl.yaml"
READER = "{kind: quiz, reader: tiny/reader, engine: transformers, presentations: sampled, questions: %d}"
ALL = "{kind: quiz, reader: tiny/reader, engine: transformers}"
REPETITION = "{kind: repetition, weight: 0.5}"
VERIFIED = "{kind: verified, model: tiny/teacher, engine: transformers, words: 10, least: 4, missing: 0.25, weight: %g}"
HINGE = "{kind: length, free: 80, most: 160, weight: 0.2}"
EVERY = 20  # steps between checkpoints
NO_ALARMS = ("alarms.truncated=1", "alarms.repeating=1")  # a control must not be stopped


def quiz(questions: int) -> str:
    return f"rewards=[{READER % questions}, {REPETITION}]"


def rows(data: Path) -> dict[str, tuple[str, ...]]:
    """Overrides of each row."""
    return {
        "all questions, all orders": (),
        **{f"{count} drawn per caption": (quiz(count),) for count in (1, 2, 4, 8)},
        "4 drawn, not screened": (quiz(4), f"data.questions={data}/train-quiz/written"),
        "quiz and true sentences": (f"rewards=[{ALL}, {VERIFIED % 0.45}, {HINGE}, {REPETITION}]",),  # as tiny-verified
        "length alone": ("rewards=[{kind: length, shape: longer, most: 160, weight: 1}]", *NO_ALARMS),
        "judged by its base model": (
            "rewards=[{kind: judge, model: tiny/captioner, engine: transformers}]",
            *NO_ALARMS,
        ),
    }


EVALUATED = ("--prompt", "plain", "--samples", "2", "--max-tokens", "160", "--temperature", "1")


def found(out: Path) -> dict[str, float]:
    """Metrics of the captioner in an evaluation's report."""
    system = captioner(out)
    truth = system["truth"]
    return {
        "quiz accuracy": system["quiz"]["accuracy"]["value"],
        "wrong per caption": truth["wrong"]["value"],
        "made up per caption": truth["hallucinated"]["value"],
        "precision": truth["precision"]["value"],
        "recall": truth["recall"]["value"],
        "tokens": system["text"]["tokens"],
        "loops": system["text"]["loops"],
    }


def over_seeds(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure, and its standard deviation where there are several tables."""
    table: dict[str, float] = {}
    for name in tables[0]:
        values = [figures[name] for figures in tables]
        table[name] = round(mean(values), 4)
        if len(values) > 1:
            table[f"{name}, deviation"] = round(stdev(values), 4)
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/tiny"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--at", type=int, nargs="+", default=[40], help="steps to evaluate after, multiples of 20")
    parser.add_argument("--model", default="tiny/captioner", help="the captioner to train")
    parser.add_argument("--set", action="append", default=[], help="a further override of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows with one of these in their name")
    options = parser.parse_args()
    if any(step <= max(options.at) - 3 * EVERY or step % EVERY for step in options.at):
        parser.error(f"--at: checkpoints are saved every {EVERY} steps, and the last three kept")
    return options


def main() -> None:
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, float]] = {}
    held = f"{options.data}/held"
    evaluate(held, options.model, options.out / "base-eval", *EVALUATED)
    table["base captioner"] = found(options.out / "base-eval")
    same = (*places(options.data), f"model={options.model}", f"save_every={EVERY}", *options.set)
    for name, overrides in rows(options.data).items():
        if not any(part in name for part in options.rows):
            continue
        reached: dict[int, list[dict[str, float]]] = {step: [] for step in options.at}
        for seed in options.seeds:
            run = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            train(str(RECIPE), run, max(options.at), (*same, f"seed={seed}", *overrides))
            for step, tables in reached.items():
                out = options.out / f"{run.name}-eval-{step}"
                evaluate(held, str(run / f"step-{step:06d}"), out, *EVALUATED)
                tables.append(found(out))
                print(json.dumps({name: tables[-1], "step": step, "seed": seed}), file=sys.stderr, flush=True)
        for step, tables in reached.items():
            table[f"{name}, {step} steps"] = over_seeds(tables)
    print(json.dumps({"bench": "ablations", "at": options.at, "seeds": options.seeds, "rows": table}))


def places(data: Path) -> tuple[str, ...]:
    return tuple(
        f"{section}.{key}={data}/{part}-{kind}"
        for section, part in (("data", "train"), ("validation", "held"))
        for key, kind in (("shards", "shards"), ("questions", "quiz"))
    )


if __name__ == "__main__":
    main()
