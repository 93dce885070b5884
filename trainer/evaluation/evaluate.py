"""From graded rows to a report: quiz accuracy, truth, text, by system, with intervals over images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import BadInput
from ...models.quiz import KINDS
from ...models.tiny.world.grade import grade, parse
from ...models.tiny.world.scenes import Scene
from ...stages.questions.grade import CONTROLS
from .ability import BLIND, ORACLE, SELF_ORACLE, Ability, PositionCounts, cautions
from .bootstrap import NOTHING, RECALL_AT, RESAMPLES, Estimate, Figure, Ratios, found_at
from .graded_rows import GradedCaption, GradedImage, GradedQuestion, mean, places_of_answer, read_row, scored_answers
from .results import (
    Caution,
    EvaluationReport,
    Judged,
    PositionAccuracy,
    Quiz,
    Retrieval,
    ShownAnswer,
    ShownCaption,
    System,
    Truth,
    json_ready,
)
from .text_statistics import TextTally

EXAMPLES = 3  # images of which the report shows captions
_UNTRUE = (SELF_ORACLE, "empty", BLIND)  # controls that state nothing by themselves, to be compared with the truth


def evaluate(
    rows: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    ranks: Mapping[tuple[str, str], int] | None = None,
    gallery: int = 0,
    cosines: Mapping[tuple[str, str], float] | None = None,
    logps: Mapping[str, Sequence[float]] | None = None,
    where: str = "the graded rows",
    warnings: Sequence[Caution] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> EvaluationReport:
    """The report on rows of the GRADE schema, read once.

    ``settings``: JSON-ready facts for the reader of the report (model, reader, fingerprints); ``ranks``: by uid and
    caption, from :mod:`.retrieval`, in a ``gallery`` of so many images; ``cosines``: the same way, of a caption's and
    its image's features; ``logps``: of each caption's tokens under a language model, by its text; ``where``: the rows'
    name in errors; ``warnings``: what is known to be wrong already. Raises BadInput where there is no row,
    no question, or no answer with a score.
    """
    tally = _Tally(ranks=ranks or {}, cosines=cosines or {}, logps=logps or {})
    for row in rows:
        tally.add(row, where)
    tally.check(where)
    estimates = tally.ratios.estimates(len(tally.images), resamples, seed)
    figures = {figure: estimate for figure, (estimate, _) in estimates.items()}
    systems = tuple(tally.systems[name].system(name, figures, gallery) for name in ordered(tally.systems))
    return EvaluationReport(
        images=len(tally.images),
        rows=tally.rows,
        questions=tally.questions,
        unscored=tally.unscored,
        excluded=dict(sorted(tally.excluded.items())),
        settings=json_ready(settings),
        resamples=resamples,
        seed=seed,
        systems=systems,
        examples=tuple(tally.examples),
        warnings=(*warnings, *_of_reader(systems, {name: each.places for name, each in tally.systems.items()})),
    )


def _of_reader(systems: Sequence[System], places: Mapping[str, PositionCounts]) -> list[Caution]:
    """What the controls say against the reader; nothing where they were not graded."""
    means = {each.name: value for each in systems if (value := each.quiz.accuracy.value) is not None}
    by_control = {name: means[name] for name in (SELF_ORACLE, ORACLE) if name in means}
    if BLIND not in means or not by_control:
        return []
    best = max(by_control, key=lambda name: by_control[name])
    return cautions(Ability(means[BLIND], by_control, places[best].accuracies()))


def ordered(systems: Iterable[str]) -> list[str]:
    """Prompts as they come, then the controls from the best to the worst."""
    names = list(systems)
    return [name for name in names if name not in CONTROLS] + [name for name in CONTROLS if name in names]


def kinds_in_order(kinds: Iterable[str]) -> list[str]:
    """The kinds that we know in our order, then others by name."""
    return sorted(set(kinds), key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))


@dataclass
class _SystemTally:
    """What is counted of one system, beside the ratios."""

    samples: int = 0
    captions: int = 0
    unscored: int = 0
    graded: int = 0  # captions compared with a scene
    ranked: int = 0  # captions that searched a gallery
    excluded: Counter[str] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)  # presentations, by the place of the right option
    scored: Counter[int] = field(default_factory=Counter)
    places: PositionCounts = field(default_factory=PositionCounts)
    text: TextTally = field(default_factory=TextTally)

    def system(self, name: str, figures: Mapping[Figure, Estimate], gallery: int) -> System:
        """The figures of this system, ``name``."""

        def figure(measure: str) -> Estimate:
            return figures.get((name, measure, ""), NOTHING)

        kinds = kinds_in_order(kind for of, measure, kind in figures if (of, measure) == (name, "accuracy") and kind)
        quiz = Quiz(
            accuracy=figure("accuracy"),
            best=figure("best"),
            abstained=figure("abstained"),
            by_kind={kind: figures[name, "accuracy", kind] for kind in kinds},
            by_place=tuple(
                PositionAccuracy(place, self.right[place], self.scored[place]) for place in sorted(self.scored)
            ),
            unscored=self.unscored,
        )
        measures = ("precision", "recall", "hallucinated", "chair_i", "chair_s")
        truth = Truth(self.graded, *(figure(measure) for measure in measures)) if self.graded else None
        text = self.text.statistics() if name != "blind" else None
        found = {k: figure(f"recall@{k}") for k in RECALL_AT}
        retrieval = Retrieval(gallery, self.ranked, found) if self.ranked else None
        said = Judged(figure("cosine"), figure("logp"))
        judged = None if said == Judged(NOTHING, NOTHING) else said
        return System(name, self.samples, self.captions, dict(self.excluded), quiz, truth, text, retrieval, judged)


@dataclass
class _Tally:
    """All that is counted while the rows go by."""

    ranks: Mapping[tuple[str, str], int] = field(default_factory=dict)
    cosines: Mapping[tuple[str, str], float] = field(default_factory=dict)
    logps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rows: int = 0
    questions: int = 0
    unscored: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    said: str = ""  # the first reason of a row that it is not graded, or not with a score
    images: dict[str, int] = field(default_factory=dict)  # numbers, in the order of their first row
    systems: dict[str, _SystemTally] = field(default_factory=dict)
    ratios: Ratios = field(default_factory=Ratios)
    examples: list[ShownCaption] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Count one row, or the reason why it is excluded."""
        graded = read_row(row, where)
        self.said = self.said or row["error"] or ""
        if isinstance(graded, str):
            self.excluded[graded] += 1
            return
        self.rows += 1
        self.questions += len(graded.questions)
        image = self.images.setdefault(graded.image, len(self.images))
        unscored: set[str] = set()
        for name in graded.captions:
            unscored |= self._add_system(name, graded, image)
        self.unscored += len(unscored)
        if self.rows <= EXAMPLES:
            self.examples += [_example(name, graded) for name in ordered(graded.captions) if graded.captions[name]]

    def check(self, where: str) -> None:
        """Raise BadInput where nothing was counted that a figure could be made of."""
        if not self.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.excluded.items()))
            reasons = f"{reasons}; the first says: {self.said}" if self.said else reasons
            found = f"no row with questions and captions ({reasons})" if reasons else "no row at all"
            raise BadInput(f"{where}: {found}; give captions and questions of the same images")
        if not any(system.scored for system in self.systems.values()):
            why = f": {self.said}; take another --reader or --reader-mode" if self.said else "; take another --reader"
            raise BadInput(f"{where}: none of the {self.questions} questions has a score{why}")

    def _add_system(self, name: str, graded: GradedImage, image: int) -> set[str]:
        """Count one system's captions of an image; the ids of the questions that it has no score for."""
        captions = graded.captions[name]
        tally = self.systems.setdefault(name, _SystemTally())
        tally.samples = max(tally.samples, len(captions))
        tally.captions += len(captions)
        tally.excluded += graded.excluded.get(name, Counter())
        unscored = {each.id for each in graded.questions if not self._add_question(name, captions, each, image)}
        tally.unscored += len(unscored)
        for caption in captions:
            tally.text.add(caption.text, caption.n_tokens, image)
            if (rank := self.ranks.get((graded.image, caption.text))) is not None:
                tally.ranked += 1
                for k, hit in found_at(rank).items():
                    self.ratios.add((name, f"recall@{k}", ""), image, hit)
            if (cosine := self.cosines.get((graded.image, caption.text))) is not None:
                self.ratios.add((name, "cosine", ""), image, cosine)
            if (logp := self.logps.get(caption.text)) and name != "blind":
                self.ratios.add((name, "logp", ""), image, sum(logp), len(logp))
            if graded.scene is not None and name not in _UNTRUE:
                tally.graded += 1
                self._add_truth(name, caption.text, graded.scene, image)
        return unscored

    def _add_question(self, name: str, captions: Iterable[GradedCaption], question: GradedQuestion, image: int) -> bool:
        """Count one question's answers, and say whether it has any score."""
        answers = scored_answers(captions, question.id)
        if not answers:
            return False
        accuracy = mean([each.accuracy for each in answers])
        self.ratios.add((name, "accuracy", ""), image, accuracy)
        self.ratios.add((name, "accuracy", question.kind), image, accuracy)
        self.ratios.add((name, "best", ""), image, max(each.accuracy for each in answers))
        self.ratios.add((name, "abstained", ""), image, mean([each.abstention for each in answers]))
        tally = self.systems[name]
        for answer in answers:
            places = places_of_answer(question.options, question.answer, len(answer.chosen))
            hits = [None if chosen is None else chosen == question.answer for chosen in answer.chosen]
            tally.places.add(places, hits)
            for place, chosen in zip(places, answer.chosen, strict=True):
                if chosen is not None:
                    tally.scored[place] += 1
                    tally.right[place] += chosen == question.answer
        return True

    def _add_truth(self, name: str, text: str, scene: Scene, image: int) -> None:
        """Count what one caption states of a scene."""
        graded, facts = grade(scene, text), parse(text)
        stated, mentioned = graded.stated.total(), len(facts.things) + len(facts.signs)
        self.ratios.add((name, "precision", ""), image, graded.correct.total(), stated)
        self.ratios.add((name, "recall", ""), image, graded.recalled.total(), graded.expected.total())
        self.ratios.add((name, "hallucinated", ""), image, graded.hallucinated)
        self.ratios.add((name, "chair_i", ""), image, graded.hallucinated, mentioned)
        self.ratios.add((name, "chair_s", ""), image, graded.hallucinated > 0)


def _example(name: str, graded: GradedImage) -> ShownCaption:
    """The system's first caption of the image with its answers."""
    caption = graded.captions[name][0]
    found = [(each.kind, caption.answers[each.id]) for each in graded.questions if each.id in caption.answers]
    answers = tuple(ShownAnswer(kind, each.right, each.abstained, each.scored) for kind, each in found)
    return ShownCaption(graded.key, name, None if name == "blind" else caption.text, answers)
