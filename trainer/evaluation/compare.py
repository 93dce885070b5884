"""Comparison of two runs on common questions: paired bootstrap over common images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from ...stages.questions.grade import CONTROLS
from .bootstrap import RESAMPLES, Array, Estimate, Figure, Ratios, two_sided_p
from .evaluate import kinds_in_order
from .graded_rows import mean, read_row, scored_answers
from .results import Comparison, Difference, LeftOut, Side, json_ready

Questions = dict[str, tuple[str, float | None]]  # kind and score by question id


@dataclass(frozen=True)
class EvaluationRun:
    """A named run: graded rows, read once. ``settings`` must name the ``reader``; its ``reader identity`` is compared.

    ``system``: the system to compare; None: the first captioner prompt of the rows.
    """

    name: str
    rows: Iterable[Mapping[str, Any]]
    settings: Mapping[str, Any]
    system: str | None = None


def compare(first: EvaluationRun, second: EvaluationRun, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Accuracy of ``second`` minus ``first`` on common questions of common images, overall and by kind.

    Both runs use the same resampled images, so that the images' difficulty cancels in the difference. Raises BadInput
    if the readers differ (their answers are not comparable), a run lacks the system, or there is no common question.
    """
    reader = _common_reader(first, second)
    first_system, first_scores = _scores(first)
    second_system, second_scores = _scores(second)
    ratios, images, left_out = _paired(first_scores, second_scores)
    if not images:
        raise BadInput(
            f"{first.name} and {second.name}: no question that both have a score for; "
            "compare runs on the same questions and images"
        )
    estimates = ratios.estimates(images, resamples, seed)
    kinds = kinds_in_order(kind for _, _, kind in estimates if kind)
    overall = _difference(estimates, "")
    return Comparison(
        reader=reader,
        first=Side(first.name, first_system, json_ready(first.settings)),
        second=Side(second.name, second_system, json_ready(second.settings)),
        images=images,
        questions=overall.difference.n,
        left_out=left_out,
        overall=overall,
        by_kind={kind: _difference(estimates, kind) for kind in kinds},
        resamples=resamples,
        seed=seed,
    )


def _common_reader(first: EvaluationRun, second: EvaluationRun) -> str:
    readers, identities = [], []
    for run in (first, second):
        if not run.settings.get("reader"):
            raise BadInput(f"{run.name}: it does not say which reader graded it; grade it again")
        readers.append(str(run.settings["reader"]))
        identities.append(run.settings.get("reader identity", run.settings["reader"]))
    if identities[0] != identities[1]:
        raise BadInput(
            f"{first.name} was graded by {readers[0]}, {second.name} by {readers[1]}; grade both with one reader"
        )
    return readers[0]


def _scores(run: EvaluationRun) -> tuple[str, dict[str, Questions]]:
    """The compared system and, by image, kind and score of its questions (None if unscored)."""
    system = run.system
    seen: dict[str, None] = {}
    scores: dict[str, Questions] = {}
    for row in run.rows:
        graded = read_row(row, run.name)
        if isinstance(graded, str):
            continue
        seen.update(dict.fromkeys(graded.captions))
        if system is None:
            system = next((name for name in seen if name not in CONTROLS), None)
        captions = graded.captions.get(system or "", ())
        questions = scores.setdefault(graded.image, {})
        for question in graded.questions:
            answers = scored_answers(captions, question.id)
            score = mean([answer.accuracy for answer in answers]) if answers else None
            questions.setdefault(question.id, (question.kind, score))
    if system is None or system not in seen:
        wanted = f"no captions named {system!r}" if system else "no captions of a prompt"
        raise BadInput(f"{run.name}: {wanted}; there are {', '.join(seen) or 'none at all'}")
    return system, scores


def _paired(first: Mapping[str, Questions], second: Mapping[str, Questions]) -> tuple[Ratios, int, LeftOut]:
    """Both scores of every common question and their difference, number of images, and counts of left-out items."""
    ratios = Ratios()
    common = [image for image in first if image in second]
    numbers: dict[str, int] = {}
    only_first = only_second = unscored = 0
    for image in common:
        ours, theirs = first[image], second[image]
        only_first += len(ours.keys() - theirs.keys())
        only_second += len(theirs.keys() - ours.keys())
        for question in (id_ for id_ in ours if id_ in theirs):
            (kind, score), (_, other) = ours[question], theirs[question]
            if score is None or other is None:
                unscored += 1
                continue
            number = numbers.setdefault(image, len(numbers))
            for label in ("", kind):
                ratios.add(("first", "accuracy", label), number, score)
                ratios.add(("second", "accuracy", label), number, other)
                ratios.add(("second", "difference", label), number, other - score)
    lost = LeftOut(len(first) - len(common), len(second) - len(common), only_first, only_second, unscored)
    return ratios, len(numbers), lost


def _difference(estimates: Mapping[Figure, tuple[Estimate, Array]], kind: str) -> Difference:
    difference, draws = estimates["second", "difference", kind]
    return Difference(
        first=estimates["first", "accuracy", kind][0],
        second=estimates["second", "accuracy", kind][0],
        difference=difference,
        p=None if difference.low is None else two_sided_p(draws),
    )
