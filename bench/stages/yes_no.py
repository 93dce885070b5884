"""How well a VLM answers planted yes-or-no questions and checks planted sentences, and a matching model on the same.

Held-out scenes of the rendered world, each with one question of every kind about something that is there or not, a true
sentence and its twin with one attribute changed, and a true caption and one with one attribute changed. Areas under the
ROC curve: `questions` of all answers, `sentences` of true sentences against false ones, `least` and `mean` of true
captions against changed ones by their sentences. With --seed 11 and 1,000 scenes the captions are those of
`python -m capipe.models.tiny.train.eval.scorers`. Medians over seeds; every figure is of the same scenes on both sides.

    python bench/stages/yes_no.py [--model tiny/teacher] [--itm tiny/itm] [--scenes 60] [--seeds 11]
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import report, version

from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.scorers.loading import ScorerConfig, load_scorer
from capipe.models.tiny.train.eval.yes_no import Probe, YesNoReport, evaluate_yes_no, probes, scorer_truth


async def evaluated(engine_kind: str, model: str, sets: list[list[Probe]]) -> list[YesNoReport]:
    engine = await load_engine(EngineConfig(engine_kind, model, concurrency=256))
    try:
        return [await evaluate_yes_no(engine, of) for of in sets]
    finally:
        await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny/teacher")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--itm", default="tiny/itm")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    options = parser.parse_args()
    sets = [probes(options.scenes, seed) for seed in options.seeds]
    found = asyncio.run(evaluated(options.engine, options.model, sets))
    scorer = load_scorer(ScorerConfig("itm", options.itm))
    matched = [scorer_truth(scorer, of) for of in sets]
    figures = {
        name: [getattr(each, name) for each in found]
        for name in ("questions", "sentences", "least", "mean", "lowest", "unanswered")
    }
    figures |= {
        f"itm_{name}": [getattr(each, name) for each in matched] for name in ("sentences", "least", "mean", "lowest")
    }
    used = resource.getrusage(resource.RUSAGE_SELF)
    report(
        "yes_no",
        figures,
        {package: version(package) for package in ("transformers", "torch")},
        unit="area under the ROC curve",
        model=options.model,
        itm=options.itm,
        scenes=options.scenes,
        seeds=options.seeds,
        by_kind=[each.by_kind for each in found],
        core_seconds=round(used.ru_utime + used.ru_stime, 1),
    )


if __name__ == "__main__":
    main()
