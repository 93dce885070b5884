"""What `capipe demo` made, read back from its folder: for its report and its last lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..manifests.artifact import Artifact
from ..manifests.shards import RowReader, expand
from ..manifests.status import QuestionStatus, Status
from ..trainer.figures import Report
from ..trainer.grades import system_of
from ..trainer.log import read_steps
from .chain_state import load_chain
from .status import State, state

PROMPT = "plain"  # what the captioner is trained under


@dataclass(frozen=True)
class Shown:
    """A picture of the demo with what was said about it."""

    file: str
    original: str
    short: str
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


def write_report(folder: Path) -> Path:
    """``report.md`` of the demo's chain in ``folder``; returns its path."""
    report = folder / "report.md"
    shown = list(_show(folder, 3))
    report.write_text(
        _page(state(str(folder / "captions")), shown, _quiz(folder), _gain(folder), _kept(folder)), "utf-8"
    )
    return report


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
    report = Report.from_dict(json.loads((evaluation / "report.json").read_text(encoding="utf-8")))
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
        told_before=_told(folder / "eval"),
        told_after=_told(folder / "eval-trained"),
    )


def _told(evaluation: Path) -> str:
    """The first caption of the first picture in a `capipe eval`, by the prompt that is trained."""
    artifact = Artifact.open(str(evaluation / "captions"))
    row = next(row for shard in artifact.committed() for row in artifact.read_rows(shard))
    return next(each["text"] for each in row["captions"] if system_of(each["name"]) == PROMPT) or ""


def _show(folder: Path, count: int) -> Iterator[Shown]:
    """The first pictures of the corpus with their captions."""
    artifact = Artifact.open(str(folder / "captions"))
    pairs = (
        pair
        for shard in expand(str(folder / "shards"))
        for pair in zip(RowReader(shard), artifact.read_rows(shard.name), strict=True)
    )
    for number, (source, row) in enumerate(islice(pairs, count)):
        texts = {caption["name"]: caption["text"] for caption in row["captions"]}
        yield Shown(_file(number), source.text or "", texts.get("plain", ""), texts.get("dense", ""))


def _file(number: int) -> str:
    """A picture's file, relative to the report; the corpus was ingested in this order."""
    return f"pictures/{number:06d}.jpg"


def _page(found: State, shown: list[Shown], quiz: list[str], gain: Gain | None, filtered: str) -> str:
    rows = "\n".join(f"| {status} | {count} |" for status, count in sorted(found.rows.items()))
    parts = [
        "# capipe demo",
        f"{sum(found.rows.values())} rendered scenes were ingested, captioned by `tiny/captioner` and verified.",
        f"| status | rows |\n|---|---|\n{rows}",
        f"`captions/` has {found.shards} shards, {found.bytes:,} bytes: tars with images and captions, and Parquet.",
    ]
    parts += [*quiz, "All figures of the quiz: [eval/report.md](eval/report.md)"]
    for sample in shown:
        parts.append(
            f"![]({sample.file})\n\n- alt text: {sample.original}\n- plain: {sample.short}\n- dense: {sample.dense}"
        )
    parts += [] if gain is None else _training(gain)
    parts += ["## Filtering", f"{filtered}. Histograms and samples: `filtered/shards/_capipe/report.html`."]
    parts += ["The exported shards are `final/`, their card is [final/README.md](final/README.md)."]
    return "\n\n".join(parts) + "\n"


def _training(gain: Gain) -> list[str]:
    """The report's section on training, by paragraphs."""
    return [
        "## Training",
        f"`capipe train tiny-caprl` trained the captioner for {gain.steps} steps on other scenes: its captions, asked "
        "for by the plain prompt, earned the share of questions that `tiny/reader` answered from them. Below, "
        "`tiny/holdout-reader`, by which nothing was trained, answers the questions about the first shard's pictures.",
        "| captions | quiz accuracy |\n|---|---|\n"
        f"| before | {gain.before:.3f} |\n| after | {gain.after:.3f} |\n| oracle | {gain.oracle:.3f} |",
        "All figures after training: [eval-trained/report.md](eval-trained/report.md). The first picture's caption, "
        "drawn at temperature 1:",
        f"![]({gain.file})\n\n- before: {gain.told_before}\n- after: {gain.told_after}",
    ]
