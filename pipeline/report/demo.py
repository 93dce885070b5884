"""The last lines of `capipe demo`, read from its folder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ...manifests.artifact import Artifact
from ...manifests.files.allowed import Allowed
from ...manifests.shards import expand
from ...manifests.status import QuestionStatus, Status
from ...stages.annotate.captioner import chosen_caption
from ...trainer.log import read_steps
from ..inspect.discover import Found, find
from ..inspect.images import RowImages
from ..inspect.shard_join import ShardJoin
from ..inspect.status import state
from .before_after import caption_pairs
from .evaluations import Evaluation, gain_of, read_evaluations

_CAPTIONS = 3


def lines(report: Path) -> list[str]:
    """Three final captions, two lines about the quiz, the gain from training, the folders."""
    folder = report.parent
    final = folder / "final"
    contents = find(folder)
    evaluations, _ = read_evaluations(contents)
    kept = [_kept(folder), f"report: {report}", f"card: {final / 'README.md'}", f"shards: {final}"]
    return ["three captions:", *_captions(folder), *_quiz(folder, evaluations), *_gain(contents, evaluations), *kept]


def _captions(folder: Path) -> Iterator[str]:
    """Captions of the first images, as filtering gets them."""
    artifact = Artifact.open(str(folder / "captions"))
    rows = (row for shard in expand(str(folder / "shards")) for row in artifact.read_rows(shard.name))
    for number, row in enumerate(islice(rows, _CAPTIONS)):
        yield f"  {_file(number)}: {chosen_caption(row)}"


def _quiz(folder: Path, evaluations: list[Evaluation]) -> list[str]:
    """Kept questions, and quiz accuracies before training."""
    artifact = Artifact.open(str(folder / "questions/screened"))
    rows = (row for shard in artifact.committed() for row in artifact.read_rows(shard))
    questions = [question for row in rows for question in row["questions"]]
    kept = [question for question in questions if question["status"] == QuestionStatus.OK]
    examples = [f"{question['question']} ({', '.join(question['options'])})" for question in kept[:2]]
    accuracies = [f"{name} {accuracy:.2f}" for name, accuracy in evaluations[0].accuracies.items()]
    return [
        f"{len(kept)} of {len(questions)} questions kept, e.g. {' '.join(examples)}",
        f"quiz accuracy: {', '.join(accuracies)}",
    ]


def _gain(contents: Found, evaluations: list[Evaluation]) -> list[str]:
    """Captions of the first held-out image before and after training, and quiz accuracies; empty without training."""
    gain = gain_of(evaluations)
    if gain is None or contents.chain is None or contents.chain.stage("train") is None:  # left by an earlier run
        return []
    pairs = caption_pairs(ShardJoin(contents.artifacts), gain, RowImages(Allowed(contents.root)), 1)
    captions = [
        line
        for pair in pairs
        for line in (f"  {_file(0)} before: {pair.before.text}", f"  {_file(0)} after: {pair.after.text}")
    ]
    steps = len(read_steps(Path(contents.root) / "train"))
    oracle = gain.before.accuracies["oracle"]
    accuracies = f"{gain.accuracy_before:.2f} -> {gain.accuracy_after:.2f}"
    return [*captions, f"training: quiz accuracy {accuracies} in {steps} steps (oracle captions {oracle:.2f})"]


def _kept(folder: Path) -> str:
    """Rows kept by filtering, and the others by status."""
    rows = state(str(folder / "filtered/shards")).rows
    removed = ", ".join(f"{count} {status}" for status, count in sorted(rows.items()) if status != Status.OK)
    return f"filter: {rows.get(Status.OK, 0)} of {sum(rows.values())} rows kept ({removed or 'none'} removed)"


def _file(number: int) -> str:
    """File of an image in the demo's folder; images were ingested in this order."""
    return f"pictures/{number:06d}.jpg"
