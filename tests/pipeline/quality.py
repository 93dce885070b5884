"""How good are the quizzes? Questions against the scene graph, planted bad ones, captions between floor and ceiling.

The test runs a short version; the long one is a command:

    python -m tests.pipeline.quality --scenes 500 --planted 200 --engine vllm
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from capipe.models.quiz import Question
from capipe.models.tiny.train.texts.quiz import (
    facts_of,
    leaking,
    possible,
    quiz,
    sample_asked,
    solve,
    understand,
)
from capipe.models.tiny.train.texts.quiz_curriculum import KNOWLEDGE
from capipe.models.tiny.world.corpus import CorpusSample, write_corpus

_COMMAND = [sys.executable, "-m", "capipe.pipeline"]
SHARD = 100


@dataclass
class Written:
    """Questions that a teacher wrote about held-out scenes. ``gold``: share of the kept that are right in the scene.

    ``gold_written``: of all that were well formed, before the screen. ``statuses``: of all questions.
    """

    scenes: int
    kept: int
    gold: float
    gold_written: float
    statuses: dict[str, int]


@dataclass
class Planted:
    """What the screen did to good questions and to planted bad ones: shares kept or rejected."""

    good: int
    leaked: int
    wrong: int
    good_kept: float
    leaked_rejected: float
    wrong_rejected: float


@dataclass
class Graded:
    """Quiz accuracies of a captioner (mean over k, best of k) and of the controls, by a report's names."""

    questions: int
    accuracy: dict[str, float]
    best_of_k: dict[str, float]


def written_trial(shards: Path, corpus: list[CorpusSample], out: Path, *options: Any) -> Written:
    """`capipe qa` by the teacher, its gold answers held against the scenes."""
    _run("qa", "--shards", shards, "--out", out, *options)
    scenes = {sample.key: sample.scene for sample in corpus}
    statuses: Counter[str] = Counter()
    kept, formed = [], []
    for row in rows(out / "screened"):
        for entry in row["questions"]:
            statuses[entry["status"]] += 1
            if entry["answer"] is None:
                continue
            asked = understand(entry["question"])
            truth = solve(asked, facts_of(scenes[_name(row)])) if asked is not None else None
            formed.append(entry["options"][entry["answer"]] == truth)
            if entry["status"] == "ok":
                kept.append(formed[-1])
    return Written(
        len(corpus), len(kept), sum(kept) / len(kept), sum(formed) / len(formed), dict(sorted(statuses.items()))
    )


def planted_trial(shards: Path, corpus: list[CorpusSample], out: Path, bad: int, *options: Any) -> Planted:
    """Good questions, ``bad`` that tell their answers (or that anybody knows) and ``bad`` with a wrong gold answer."""
    rng = Random("planted")
    sets = {"good": [], "leaked": [], "wrong": []}  # type: dict[str, list[tuple[str, Question]]]
    for number in range(bad):
        sample = corpus[number % len(corpus)]
        sets["leaked"].append((sample.key, _leaking(sample, rng, number)))
        asked = sample_asked(sample.scene, rng)
        question = quiz(sample.scene, asked, rng)
        others = [place for place in range(len(question.options)) if place != question.answer]
        sets["wrong"].append((sample.key, replace(question, answer=rng.choice(others))))
    for sample in corpus:
        sets["good"] += [(sample.key, quiz(sample.scene, sample_asked(sample.scene, rng), rng)) for _ in range(2)]
    file = out.with_suffix(".jsonl")
    entries = [(name, key, question) for name, pairs in sets.items() for key, question in pairs]
    rng.shuffle(entries)
    file.write_text("".join(f"{json.dumps(_record(*entry))}\n" for entry in entries), encoding="utf-8")
    _run("qa", "--shards", shards, "--out", out, "--import", file, *options)
    kept = Counter[str]()
    found = {
        (_name(row), e["question"], e["answer"]): e["status"]
        for row in rows(out / "screened")
        for e in row["questions"]
    }
    total = Counter[str]()
    for name, key, question in entries:
        status = found[key, question.text, question.answer]
        if status != "duplicate":  # the same question may have been drawn twice for an image
            total[name] += 1
            kept[name] += status == "ok"
    share = {name: kept[name] / total[name] for name in sets}
    return Planted(
        total["good"], total["leaked"], total["wrong"], share["good"], 1 - share["leaked"], 1 - share["wrong"]
    )


def graded_trial(shards: Path, questions: Path, out: Path, *options: Any) -> Graded:
    """`capipe eval` of a captioner."""
    _run("eval", "--shards", shards, "--questions", questions, "--out", out, *options)
    report = json.loads((out / "report.json").read_text())
    systems = {system["name"]: system["quiz"] for system in report["systems"]}
    accuracy = {name: round(quiz["accuracy"]["value"], 4) for name, quiz in systems.items()}
    best = {name: round(quiz["best"]["value"], 4) for name, quiz in systems.items()}
    return Graded(report["questions"], accuracy, best)


def rows(artifact: Path) -> Iterator[dict[str, Any]]:
    """All rows of an artifact in order."""
    for path in sorted(artifact.glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()


def _leaking(sample: CorpusSample, rng: Random, number: int) -> Question:
    if number % 10 == 0:
        text, right, pool = rng.choice(KNOWLEDGE)
        options = [right, *rng.sample([value for value in pool if value != right], 3)]
        return Question(text, tuple(options), 0)
    asked = rng.choice([each for each in possible(sample.scene) if each.target is not None])
    return quiz(sample.scene, leaking(asked, sample.scene), rng)


def _record(name: str, key: str, question: Question) -> dict[str, Any]:
    answer = question.options[question.answer]
    return {"image": f"{key}.jpg", "question": question.text, "options": question.options, "answer": answer}


def _name(row: dict[str, Any]) -> str:
    """A corpus key: the shards' keys are numbers of their own, in the order of the files."""
    return f"{int(row['key']):06d}"


def _run(*arguments: Any) -> None:
    done = subprocess.run([*_COMMAND, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"capipe {arguments[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--planted", type=int, default=200)
    parser.add_argument("--engine", default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus", given.scenes, "heldout", 31)
        _run("ingest", folder / "corpus", "--out", folder / "shards", "--shard-size", SHARD)
        engine = ("--engine", given.engine)
        shards = folder / "shards"
        written = written_trial(shards, corpus, folder / "qa", "--model", "tiny/teacher", *engine)
        print(json.dumps(asdict(written)), flush=True)
        screen = ("--screen-model", "tiny/teacher", *engine)
        print(json.dumps(asdict(planted_trial(shards, corpus, folder / "planted", given.planted, *screen))), flush=True)
        captioner = ("--model", "tiny/captioner", "--reader", "tiny/holdout-reader", "--max-tokens", 256, *engine)
        print(json.dumps(asdict(graded_trial(shards, folder / "qa", folder / "eval", *captioner))), flush=True)


if __name__ == "__main__":
    main()
