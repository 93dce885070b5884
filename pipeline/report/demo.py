"""What `capipe demo` made, read back from its folder for its last lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...manifests.artifact import Artifact
from ...manifests.shards import expand
from ...manifests.status import QuestionStatus, Status
from ...trainer.evaluation.graded_rows import system_of
from ...trainer.evaluation.results import EvaluationReport
from ...trainer.log import read_steps
from ..inspect.chain_state import load_chain
from ..inspect.status import state

PROMPT = "plain"  # what the captioner is trained under


@dataclass(frozen=True)
class Shown:
    """A picture of the demo and what was said about it."""

    file: str
    dense: str


@dataclass(frozen=True)
class Gain:
    """What training did: quiz accuracies of held-out pictures, and the first one's caption before and after."""

    steps: int
    before: float
    after: float
    oracle: float
    file: str
    told_before: str
    told_after: str

    def line(self) -> str:
        return (
            f"training: quiz accuracy {self.before:.2f} -> {self.after:.2f} in {self.steps} steps "
            f"(oracle captions {self.oracle:.2f})"
        )


def lines(report: Path) -> list[str]:
    """What the demo ends with: three captions, the quiz in two lines, what training gained, where everything is."""
    folder = report.parent
    gain, final = _gain(folder), folder / "final"
    trained = [] if gain is None else _before_and_after(gain)
    texts = [f"  {s.file}: {s.dense}" for s in _show(folder, 3)]
    kept = [_kept(folder), f"report: {report}", f"card: {final / 'README.md'}", f"shards: {final}"]
    return ["three captions:", *texts, *_quiz(folder), *trained, *kept]


def _kept(folder: Path) -> str:
    """What filtering left, and why the rest is gone."""
    rows = state(str(folder / "filtered/shards")).rows
    gone = ", ".join(f"{count} {status}" for status, count in sorted(rows.items()) if status != Status.OK)
    return f"filter: {rows.get(Status.OK, 0)} of {sum(rows.values())} rows kept ({gone or 'none'} removed)"


def _before_and_after(gain: Gain) -> list[str]:
    return [f"  {gain.file} before: {gain.told_before}", f"  {gain.file} after: {gain.told_after}", gain.line()]


def _quiz(folder: Path) -> list[str]:
    """What the quiz steps gave, in lines."""
    artifact = Artifact.open(str(folder / "questions/screened"))
    entries = [e for shard in artifact.committed() for row in artifact.read_rows(shard) for e in row["questions"]]
    kept = [entry for entry in entries if entry["status"] == QuestionStatus.OK]
    accuracies = [f"{name} {accuracy:.2f}" for name, accuracy in _accuracies(folder / "eval").items()]
    shown = [f"{entry['question']} ({', '.join(entry['options'])})" for entry in kept[:2]]
    return [
        f"{len(kept)} of {len(entries)} questions kept, e.g. {' '.join(shown)}",
        f"quiz accuracy: {', '.join(accuracies)}",
    ]


def _accuracies(evaluation: Path) -> dict[str, float]:
    """Quiz accuracy by system of a `capipe eval`."""
    report = EvaluationReport.from_dict(json.loads((evaluation / "report.json").read_text(encoding="utf-8")))
    return {each.name: each.quiz.accuracy.value for each in report.systems if each.quiz.accuracy.value is not None}


def _gain(folder: Path) -> Gain | None:
    """What training did, None where nothing was trained or nothing could be measured."""
    chain = load_chain(folder)
    if chain is None or chain.stage("train") is None:
        return None
    before, after = _accuracies(folder / "eval"), _accuracies(folder / "eval-trained")
    if PROMPT not in before or PROMPT not in after or "oracle" not in before:
        return None
    return Gain(
        steps=len(read_steps(folder / "train")),
        before=before[PROMPT],
        after=after[PROMPT],
        oracle=before["oracle"],
        file=_file(0),
        told_before=_first_caption(folder / "eval"),
        told_after=_first_caption(folder / "eval-trained"),
    )


def _first_caption(evaluation: Path) -> str:
    """The first caption of the first picture in a `capipe eval`, by the prompt that is trained."""
    artifact = Artifact.open(str(evaluation / "captions"))
    row = next(row for shard in artifact.committed() for row in artifact.read_rows(shard))
    return next(each["text"] for each in row["captions"] if system_of(each["name"]) == PROMPT) or ""


def _show(folder: Path, count: int) -> Iterator[Shown]:
    """The first pictures of the corpus with their captions."""
    artifact = Artifact.open(str(folder / "captions"))
    rows = (row for shard in expand(str(folder / "shards")) for row in artifact.read_rows(shard.name))
    for number, row in enumerate(islice(rows, count)):
        texts = {caption["name"]: caption["text"] for caption in row["captions"]}
        yield Shown(_file(number), texts.get("dense", ""))


def _file(number: int) -> str:
    """A picture's file in the demo's folder; they were ingested in this order."""
    return f"pictures/{number:06d}.jpg"
