"""Quiz accuracies of a folder's evaluations, and the gain from training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue, TypeAdapter, ValidationError

from ...errors import BadInput, CapipeError
from ...manifests.files.storage import Folder
from ...stages.export.provenance import last_part, public
from ...stages.questions.grade import CONTROLS
from ...trainer.evaluation.bootstrap import Estimate
from ..inspect.discover import EVALUATION, Found
from .charts import Bar


@dataclass(frozen=True)
class Further:
    """Shares of one system beyond the quiz, None without one: answers in words to ``questions`` open-ended questions by
    relaxed accuracy and ANLS, and sentences that are true by a vision-language model."""

    system: str
    relaxed: float | None
    anls: float | None
    questions: int
    sentences: float | None


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation; ``bars``: quiz accuracies.

    ``after``: the training run whose checkpoint wrote the captions, if any.
    """

    name: str
    captioner: str
    reader: str
    images: int
    questions: int
    after: str | None
    bars: list[Bar]
    warnings: tuple[str, ...] = ()
    further: tuple[Further, ...] = ()

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracies by system: an annotate caption's name, or a control."""
        return {bar.name: bar.value for bar in self.bars}


@dataclass(frozen=True)
class Gain:
    """Evaluations of one system's captions by the captioner before and after training."""

    system: str
    before: Evaluation
    after: Evaluation

    @property
    def accuracy_before(self) -> float:
        return self.before.accuracies[self.system]

    @property
    def accuracy_after(self) -> float:
        return self.after.accuracies[self.system]


def read_evaluations(contents: Found) -> tuple[list[Evaluation], dict[str, str]]:
    """Evaluations of a folder, those of trained captioners last, and reasons for unreadable ones, by name."""
    evaluations: list[Evaluation] = []
    damaged: dict[str, str] = {}
    for name, folder in contents.evaluations.items():
        try:
            evaluations.append(_evaluation(name, folder, list(contents.runs)))
        except (CapipeError, OSError, ValueError) as error:
            damaged[name] = str(error)
    return sorted(evaluations, key=lambda evaluation: evaluation.after is not None), damaged


def gain_of(evaluations: Sequence[Evaluation]) -> Gain | None:
    """The first evaluations before and after training, if they share a system other than a control."""
    after = next((evaluation for evaluation in evaluations if evaluation.after is not None), None)
    before = next((evaluation for evaluation in evaluations if evaluation.after is None), None)
    if after is None or before is None:
        return None
    shared = (name for name in after.accuracies if name in before.accuracies and name not in CONTROLS)
    system = next(shared, None)
    return None if system is None else Gain(system, before, after)


def quiz_bars(evaluations: Sequence[Evaluation]) -> list[Bar]:
    """All evaluations in one chart: captions before and after training first, the controls below them."""
    named = [
        Bar(bar.name if not bar.emphasis else f"{item.name}: {bar.name}", bar.value, bar.low, bar.high, bar.emphasis)
        for item in evaluations
        for bar in item.bars
    ]
    order = {bar.name: None for bar in sorted(named, key=lambda bar: (-bar.emphasis, bar.name.rpartition(": ")[2]))}
    by_name = {bar.name: bar for bar in named}
    return [by_name[name] for name in order]


@dataclass(frozen=True)
class _Quiz:
    accuracy: Estimate


@dataclass(frozen=True)
class _OpenEnded:
    relaxed: Estimate
    anls: Estimate


@dataclass(frozen=True)
class _Sentences:
    true: Estimate


@dataclass(frozen=True)
class _System:
    name: str
    quiz: _Quiz
    open_ended: _OpenEnded | None = None
    sentences: _Sentences | None = None


@dataclass(frozen=True)
class _Caution:
    text: str


@dataclass(frozen=True)
class _Report:
    """Displayed fields of the report in trainer/evaluation/results.py; importing that module loads torch (seconds)."""

    images: int
    questions: int
    settings: dict[str, JsonValue]
    systems: tuple[_System, ...]
    warnings: tuple[_Caution, ...] = ()


def _evaluation(name: str, folder: str, runs: Sequence[str]) -> Evaluation:
    try:
        report = TypeAdapter(_Report).validate_json(Folder(folder).read_bytes(EVALUATION))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{EVALUATION}: {field}: {first['msg']}; `capipe eval` writes it anew") from None
    captioner = str(report.settings.get("captioner", "")).rpartition("@")[0]
    after = next((run for run in runs if f"/{run}/step-" in f"/{captioner}"), None)
    bars = []
    for system in report.systems:
        quiz = system.quiz.accuracy
        if quiz.value is not None:
            bars.append(Bar(system.name, quiz.value, quiz.low, quiz.high, int(system.name not in CONTROLS)))
    reader = str(report.settings.get("reader", "")).partition("@")[0]
    shown = last_part(captioner) if "/step-" in captioner else captioner
    warnings = tuple(warning.text for warning in report.warnings)
    further = tuple(entry for system in report.systems if (entry := _further(system)) is not None)
    return Evaluation(name, shown, public(reader), report.images, report.questions, after, bars, warnings, further)


def _further(system: _System) -> Further | None:
    """What a system has beyond the quiz; None if that is nothing."""
    opened, checked = system.open_ended, system.sentences
    true = None if checked is None else checked.true.value
    if opened is None:
        return None if true is None else Further(system.name, None, None, 0, true)
    return Further(system.name, opened.relaxed.value, opened.anls.value, opened.relaxed.n, true)
