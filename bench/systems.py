"""The three published systems, and the quiz's captioner trained on CLIP, at the bundled models' scale, in one measure.

Each row is a `capipe train` of a bundled recipe, optionally with overrides, and a `capipe eval` of its last checkpoint:
greedy captions of held-out scenes, the hold-out reader, a CLIP not used as a reward. Finished runs in --out are not
repeated. `recipes/tiny-caprl.yaml` describes how to make the data, with 200 held-out scenes here; `--tables retrieval`
also needs train-1, train-8 and train-128 in --data: the first 1, 8 and 128 images of train, with shards and quiz.

    python bench/systems.py --data data/tiny --out runs/systems --tables systems vlrm retrieval
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _runs import captioner, cost, evaluate, train, updates

JUDGED = ("--clip", "tiny/eval-clip", "--cosine", "tiny/clip", "--language-model", "tiny/opt", "--no-controls")
GREEDY = ("--samples", "1", "--temperature", "0", "--max-tokens", "160")
NO_ALARMS = ("alarms.truncated=1", "alarms.repeating=1", "alarms.kl=1000")  # a control must not be stopped
ON_CLIP = (
    "rewards=[{kind: clip, model: tiny/clip, weight: 10}, {kind: repetition, weight: 0.5}]",
    "validation=null",
    "data.questions=null",
    *NO_ALARMS,
)


@dataclass(frozen=True)
class Row:
    """``recipe``: None to evaluate the bundled ``model`` without training."""

    model: str
    recipe: str | None = None
    sets: tuple[str, ...] = ()
    on: tuple[str, ...] = ("held",)  # the parts it is evaluated on


SYSTEMS = {
    "tiny/captioner": Row("tiny/captioner"),
    "quiz": Row("tiny/captioner", "tiny-caprl"),
    "quiz's captioner on CLIP": Row("tiny/captioner", "tiny-caprl", ON_CLIP),
    "tiny/blip2": Row("tiny/blip2"),
    "VLRM": Row("tiny/blip2", "tiny-vlrm"),
    "VLRM-RS": Row("tiny/blip2", "tiny-vlrm-rs"),
    "tiny/vit-gpt2": Row("tiny/vit-gpt2"),
    "retrieval PPO": Row("tiny/vit-gpt2", "tiny-retrieval-ppo"),
    "diffusion PPO": Row("tiny/vit-gpt2", "tiny-diffusion-ppo"),
}
IMAGES = (1, 8, 128)  # as in the paper's table; the recipe itself uses 128
RETRIEVAL = {
    "tiny/vit-gpt2": Row("tiny/vit-gpt2", on=("held", *(f"train-{count}" for count in IMAGES))),
    **{
        f"retrieval PPO, {count}": Row(
            "tiny/vit-gpt2", "tiny-retrieval-ppo", (f"data.images={count}", *NO_ALARMS), ("held", f"train-{count}")
        )
        for count in IMAGES[:-1]
    },
    "retrieval PPO": Row("tiny/vit-gpt2", "tiny-retrieval-ppo", on=("held", f"train-{IMAGES[-1]}")),
}


def without(recipe: Path) -> dict[str, Row]:
    """VLRM with one term left out at a time."""
    import yaml

    loaded: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    rows = {"tiny/blip2": SYSTEMS["tiny/blip2"], "VLRM": SYSTEMS["VLRM"]}
    for at, reward in enumerate(loaded["rewards"]):
        left = json.dumps([term for number, term in enumerate(loaded["rewards"]) if number != at])
        rows[f"without {reward['kind']}"] = Row("tiny/blip2", "tiny-vlrm", (f"rewards={left}", *NO_ALARMS))
    return {**rows, "without KL": Row("tiny/blip2", "tiny-vlrm", ("algorithm.kl=0", *NO_ALARMS))}


def found(out: Path) -> dict[str, Any]:
    """Metrics of an evaluation."""
    system = captioner(out)
    truth, text, retrieval, judged = (system[part] for part in ("truth", "text", "retrieval", "judged"))
    return {
        "quiz accuracy": system["quiz"]["accuracy"]["value"],
        **{f"recall@{at}": share["value"] for at, share in retrieval["recall"].items()},
        "cosine": judged["cosine"]["value"],
        "made up per caption": truth["hallucinated"]["value"],
        "precision": truth["precision"]["value"],
        "recall": truth["recall"]["value"],
        "words": text["words"],
        "colours": text["colors"],
        "phrases": text["phrases"],
        "repeated 4-grams": text["rep_4"],
        "perplexity": math.exp(-judged["logp"]["value"]),
    }


def logged(run: Path) -> dict[str, float]:
    """From a run's log: mean rewards over its first and last fifth, last and largest KL divergence (k3, nats a token).

    Runs of versions that logged the loss's own estimator have no divergence here.
    """
    entries = updates(run)
    part = max(1, len(entries) // 5)
    first, last = entries[:part], entries[-part:]
    names = [name for name in entries[0] if name.startswith("reward") and isinstance(entries[0][name], float)]
    rewards = {
        f"{name} {when}": sum(entry[name] for entry in some) / part
        for name in names
        for when, some in (("first", first), ("last", last))
        if all(entry.get(name) is not None for entry in some)
    }
    k3 = [entry["kl"] for entry in entries if entry.get("kl") is not None and "steps_skipped" in entry]
    return {**rewards, **({"k3 last": k3[-1], "k3 most": max(k3)} if k3 else {})}


def measure(name: str, row: Row, table: str, data: Path, out: Path) -> dict[str, Any]:
    """Train and evaluate one row, by part of the data if it is evaluated on several."""
    folder = out / name.replace("/", "-").replace("'", "").replace(",", "").replace(" ", "-").lower()
    model, figures = row.model, dict[str, Any]()
    if row.recipe is not None:
        model = str(train(row.recipe, folder, sets=(*places(row, data), *row.sets)))
        figures |= {**cost(folder), "log": logged(folder)}
    prompt = ("--prompt", "plain" if row.model == "tiny/captioner" else "none")
    for part in row.on:
        evaluated = out / f"{folder.name}-on-{part}"
        evaluate(str(data / part), model, evaluated, *prompt, *GREEDY, *JUDGED)
        figures |= found(evaluated) if len(row.on) == 1 else {part: found(evaluated)}
    print(json.dumps({table: {name: figures}}), file=sys.stderr, flush=True)
    return figures


def places(row: Row, data: Path) -> tuple[str, ...]:
    """Overrides with the paths of the data."""
    quiz = row.recipe == "tiny-caprl" and "data.questions=null" not in row.sets
    questions = (
        f"data.questions={data}/train-quiz",
        f"validation.shards={data}/held-shards",
        f"validation.questions={data}/held-quiz",
    )
    return (f"data.shards={data}/train-shards", *(questions if quiz else ()))


def main() -> None:
    recipes = Path(__file__).parent.parent / "recipes"
    tables = {"systems": SYSTEMS, "vlrm": without(recipes / "tiny-vlrm.yaml"), "retrieval": RETRIEVAL}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/tiny"))
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--rows", nargs="+", help="only these rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {
        table: {
            name: measure(name, row, table, options.data, options.out)
            for name, row in tables[table].items()
            if options.rows is None or name in options.rows
        }
        for table in options.tables
    }
    print(json.dumps({"bench": "systems", "tables": results}))


if __name__ == "__main__":
    main()
