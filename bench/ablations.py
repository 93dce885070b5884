"""CapRL's ablations at the bundled models' scale: what each reward makes of the same captioner in the same steps.

Each row is a `capipe train tiny-caprl` with the overrides below, then a `capipe eval` of its last checkpoint on
held-out scenes at temperature 1 under the hold-out reader. Finished runs in --out are not repeated.

    python bench/ablations.py --data data/tiny --out runs/ablations
    python bench/ablations.py --data data/tiny --out runs/verified --rows "true sentences" --model FOLDER --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from _runs import captioner, evaluate, train

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-caprl.yaml"
READER = "{kind: quiz, reader: tiny/reader, engine: transformers, presentations: sampled, questions: %d}"
ALL = "{kind: quiz, reader: tiny/reader, engine: transformers}"
REPETITION = "{kind: repetition, weight: 0.5}"
VERIFIED = "{kind: verified, model: tiny/teacher, engine: transformers, words: 10, least: 2, weight: %g}"
HINGE = "{kind: length, free: 80, most: 160, weight: 0.2}"
NO_ALARMS = ("alarms.truncated=1", "alarms.repeating=1")  # a control must not be stopped


def quiz(questions: int) -> str:
    return f"rewards=[{READER % questions}, {REPETITION}]"


def rows(data: Path) -> dict[str, tuple[str, ...]]:
    """Overrides of each row."""
    return {
        "all questions, all orders": (),
        **{f"{count} drawn per caption": (quiz(count),) for count in (1, 2, 4, 8)},
        "4 drawn, not screened": (quiz(4), f"data.questions={data}/train-quiz/written"),
        "quiz and true sentences": (f"rewards=[{ALL}, {VERIFIED % 0.1}, {HINGE}, {REPETITION}]",),  # as tiny-verified
        "quiz and true sentences, at full weight": (f"rewards=[{ALL}, {VERIFIED % 1.0}, {HINGE}, {REPETITION}]",),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/tiny"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default="tiny/captioner", help="the captioner to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="", help="only rows with this in their name")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, float]] = {}
    held = f"{options.data}/held"
    evaluate(held, options.model, options.out / "base-eval", *EVALUATED)
    table["base captioner"] = found(options.out / "base-eval")
    same = (*places(options.data), f"model={options.model}", f"seed={options.seed}")
    chosen = {name: overrides for name, overrides in rows(options.data).items() if options.rows in name}
    for name, overrides in chosen.items():
        run = options.out / name.replace(", ", "-").replace(" ", "-")
        last = train(str(RECIPE), run, options.steps, (*same, *overrides))
        evaluate(held, str(last), options.out / f"{run.name}-eval", *EVALUATED)
        table[name] = found(options.out / f"{run.name}-eval")
        print(json.dumps({name: table[name]}), file=sys.stderr, flush=True)
    print(json.dumps({"bench": "ablations", "steps": options.steps, "seed": options.seed, "rows": table}))


def places(data: Path) -> tuple[str, ...]:
    return tuple(
        f"{section}.{key}={data}/{part}-{kind}"
        for section, part in (("data", "train"), ("validation", "held"))
        for key, kind in (("shards", "shards"), ("questions", "quiz"))
    )


if __name__ == "__main__":
    main()
