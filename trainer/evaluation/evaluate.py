"""Evaluation report from graded rows: quiz accuracy, truth, text, by system, with intervals over images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import BadInput
from ...models.quiz import ABSENT, KINDS, abstains_last
from ...models.scorers.sentence_truth import TRUE_FROM
from ...models.scorers.sentences import split_sentences
from ...models.tiny.world.grade import grade, is_true, parse
from ...models.tiny.world.scenes import Scene
from ...stages.questions.answer_scores import SCALES, anls, captionqa_score, relaxed_accuracy
from ...stages.questions.grade import CONTROLS
from ...stages.questions.open_ended import says_nothing
from ...stages.questions.word_budgets import budget_of
from .ability import BLIND, ORACLE, SELF_ORACLE, Ability, PositionCounts, cautions
from .bootstrap import NOTHING, RECALL_AT, RESAMPLES, Estimate, Figure, Ratios, found_at
from .graded_rows import (
    GradedCaption,
    GradedImage,
    GradedQuestion,
    OpenEndedAnswer,
    mean,
    places_of_answer,
    read_row,
    scored_answers,
)
from .results import (
    Caution,
    EvaluationReport,
    Judged,
    OpenEnded,
    PositionAccuracy,
    Quiz,
    Retrieval,
    Sentences,
    ShownAnswer,
    ShownCaption,
    ShownWords,
    System,
    Truth,
    json_ready,
)
from .text_statistics import TextTally

EXAMPLES = 3  # images whose captions the report shows
SENTENCE_MEASURES = ("true", "wrong", "probability", "scene_true", "scene_wrong", "agreement")
OPEN_MEASURES = ("relaxed", "scaled", "anls", "abstained")
_UNTRUE = (SELF_ORACLE, "empty", BLIND)  # controls without statements of their own to compare with the truth


def evaluate(
    rows: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    ranks: Mapping[tuple[str, str], int] | None = None,
    gallery: int = 0,
    cosines: Mapping[tuple[str, str], float] | None = None,
    logps: Mapping[str, Sequence[float]] | None = None,
    truths: Mapping[tuple[str, str], Sequence[float | None]] | None = None,
    where: str = "the graded rows",
    warnings: Sequence[Caution] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> EvaluationReport:
    """Evaluate rows of the GRADE schema, read once.

    ``settings``: JSON-ready facts shown in the report (model, reader, fingerprints); ``ranks``: by uid and caption,
    from :mod:`.retrieval`; ``gallery``: its number of images; ``cosines``: of caption and image features, by uid and
    caption; ``logps``: of each caption's tokens under a language model, by text; ``truths``: how likely each sentence
    is true, None without an answer, by uid and caption; ``where``: name of the rows in errors; ``warnings``: warnings
    known already. Raises BadInput without rows, without questions, or without a scored answer.
    """
    last = abstains_last(settings.get("reader prompt", "own"))
    tally = _Tally(ranks=ranks or {}, cosines=cosines or {}, logps=logps or {}, truths=truths or {}, last=last)
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
        warnings=(*warnings, *_of_reader(systems, {name: system.places for name, system in tally.systems.items()})),
    )


def _of_reader(systems: Sequence[System], places: Mapping[str, PositionCounts]) -> list[Caution]:
    """Warnings about the reader from the controls; none if the controls were not graded."""
    means = {system.name: value for system in systems if (value := system.quiz.accuracy.value) is not None}
    by_control = {name: means[name] for name in (SELF_ORACLE, ORACLE) if name in means}
    if BLIND not in means or not by_control:
        return []
    best = max(by_control, key=lambda name: by_control[name])
    return cautions(Ability(means[BLIND], by_control, places[best].accuracies()))


def ordered(systems: Iterable[str]) -> list[str]:
    """Prompts in the given order, then the controls from best to worst."""
    names = list(systems)
    return [name for name in names if name not in CONTROLS] + [name for name in CONTROLS if name in names]


def kinds_in_order(kinds: Iterable[str]) -> list[str]:
    """Known kinds in the order of ``KINDS``, then others by name."""
    return sorted(set(kinds), key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))


@dataclass
class _SystemTally:
    """Counts of one system, beside the ratios."""

    samples: int = 0
    captions: int = 0
    unscored: int = 0
    graded: int = 0  # captions compared with a scene
    ranked: int = 0  # captions with a rank in the gallery
    checked: int = 0  # captions of which every sentence has an answer by the model that checks them
    unanswered: int = 0  # captions with a sentence without one
    opened: int = 0  # answers in words
    wordless: int = 0  # requests for such an answer that got none
    excluded: Counter[str] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)  # presentations, by position of the right option
    scored: Counter[int] = field(default_factory=Counter)
    places: PositionCounts = field(default_factory=PositionCounts)
    text: TextTally = field(default_factory=TextTally)

    def system(self, name: str, figures: Mapping[Figure, Estimate], gallery: int) -> System:
        """Figures of this system, whose name is ``name``."""

        def figure(measure: str) -> Estimate:
            return figures.get((name, measure, ""), NOTHING)

        kinds = kinds_in_order(kind for of, measure, kind in figures if (of, measure) == (name, "accuracy") and kind)
        quiz = Quiz(
            accuracy=figure("accuracy"),
            best=figure("best"),
            abstained=figure("abstained"),
            by_kind={kind: figures[name, "accuracy", kind] for kind in kinds},
            by_place=tuple(
                PositionAccuracy(index, self.right[index], self.scored[index]) for index in sorted(self.scored)
            ),
            unscored=self.unscored,
            invented=figure("invented"),
            score=figure("score"),
        )
        measures = ("precision", "recall", "hallucinated", "chair_i", "chair_s", "wrong")
        truth = Truth(self.graded, *(figure(measure) for measure in measures)) if self.graded else None
        text = self.text.statistics() if name != "blind" else None
        recall = {k: figure(f"recall@{k}") for k in RECALL_AT}
        retrieval = Retrieval(gallery, self.ranked, recall) if self.ranked else None
        sentences = None
        if self.checked or self.unanswered:
            by_sentence = [figure(f"sentence_{measure}") for measure in SENTENCE_MEASURES]
            sentences = Sentences(self.checked, self.unanswered, *by_sentence)
        scores = Judged(figure("cosine"), figure("logp"))
        judged = None if scores == Judged(NOTHING, NOTHING) else scores
        opened = None
        if self.opened or self.wordless:
            opened = OpenEnded(self.wordless, *(figure(f"open_{measure}") for measure in OPEN_MEASURES))
        excluded = dict(self.excluded)
        return System(
            name, self.samples, self.captions, excluded, quiz, truth, text, retrieval, judged, sentences, opened
        )


@dataclass
class _Tally:
    """Counts over all rows."""

    ranks: Mapping[tuple[str, str], int] = field(default_factory=dict)
    cosines: Mapping[tuple[str, str], float] = field(default_factory=dict)
    logps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    truths: Mapping[tuple[str, str], Sequence[float | None]] = field(default_factory=dict)
    last: bool = False  # the option to abstain is always the last one
    rows: int = 0
    questions: int = 0
    unscored: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    said: str = ""  # first error of a row that is not graded, or not scored
    images: dict[str, int] = field(default_factory=dict)  # numbers, in the order of their first row
    systems: dict[str, _SystemTally] = field(default_factory=dict)
    ratios: Ratios = field(default_factory=Ratios)
    examples: list[ShownCaption] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Count one row, or the reason for its exclusion."""
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
        """Raise BadInput if there is nothing to compute a figure from."""
        if not self.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.excluded.items()))
            reasons = f"{reasons}; the first says: {self.said}" if self.said else reasons
            problem = f"no row with questions and captions ({reasons})" if reasons else "no row at all"
            raise BadInput(f"{where}: {problem}; give captions and questions of the same images")
        if not any(system.scored or system.opened for system in self.systems.values()):
            why = f": {self.said}; take another --reader or --reader-mode" if self.said else "; take another --reader"
            raise BadInput(f"{where}: none of the {self.questions} questions has a score{why}")

    def _add_system(self, name: str, graded: GradedImage, image: int) -> set[str]:
        """Count one system's captions of an image; returns the ids of its unscored questions."""
        captions = graded.captions[name]
        tally = self.systems.setdefault(name, _SystemTally())
        tally.samples = max(tally.samples, len(captions))
        tally.captions += len(captions)
        tally.excluded += graded.excluded.get(name, Counter())
        unscored = {item.id for item in graded.questions if not self._add_question(name, captions, item, image)}
        tally.unscored += len(unscored)
        self._add_open_ended(name, graded.open_ended.get(name, ()), image)
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
            truths = self.truths.get((graded.image, caption.text))
            if truths is not None and budget_of(name) is None:  # cut captions are not checked, but some are whole
                self._add_sentences(name, caption.text, truths, graded.scene, image)
            if graded.scene is not None and name not in _UNTRUE:
                tally.graded += 1
                self._add_truth(name, caption.text, graded.scene, image)
        return unscored

    def _add_question(self, name: str, captions: Iterable[GradedCaption], question: GradedQuestion, image: int) -> bool:
        """Count one question's answers; returns whether it has any score."""
        answers = scored_answers(captions, question.id)
        if not answers:
            return False
        accuracy = mean([answer.accuracy for answer in answers])
        self.ratios.add((name, "accuracy", ""), image, accuracy)
        self.ratios.add((name, "accuracy", question.kind), image, accuracy)
        self.ratios.add((name, "best", ""), image, max(answer.accuracy for answer in answers))
        self.ratios.add((name, "abstained", ""), image, mean([answer.abstention for answer in answers]))
        scores = [captionqa_score(each.right, each.abstained, each.scored, question.options) for each in answers]
        self.ratios.add((name, "score", ""), image, mean(scores))
        if question.kind == ABSENT:
            said = [(answer.scored - answer.right - answer.abstained) / answer.scored for answer in answers]
            self.ratios.add((name, "invented", ""), image, mean(said))
        tally = self.systems[name]
        for answer in answers:
            places = places_of_answer(question.options, question.answer, len(answer.chosen), self.last)
            hits = [None if chosen is None else chosen == question.answer for chosen in answer.chosen]
            tally.places.add(places, hits)
            for position, chosen in zip(places, answer.chosen, strict=True):
                if chosen is not None:
                    tally.scored[position] += 1
                    tally.right[position] += chosen == question.answer
        return True

    def _add_open_ended(self, name: str, answers: Sequence[OpenEndedAnswer], image: int) -> None:
        """Count one system's answers in words about an image, each question once."""
        tally = self.systems[name]
        by_question: dict[str, list[OpenEndedAnswer]] = {}
        for answer in answers:
            if answer.said is None:
                tally.wordless += 1
            else:
                tally.opened += 1
                by_question.setdefault(answer.id, []).append(answer)
        for said in by_question.values():
            pairs = [(each.said or "", each.accepted) for each in said]
            scores = {
                "relaxed": [relaxed_accuracy(*pair) for pair in pairs],
                "scaled": [relaxed_accuracy(*pair, scales=SCALES) for pair in pairs],
                "anls": [anls(*pair) for pair in pairs],
                "abstained": [float(says_nothing(text)) for text, _ in pairs],
            }
            for measure in OPEN_MEASURES:
                self.ratios.add((name, f"open_{measure}", ""), image, mean(scores[measure]))

    def _add_truth(self, name: str, text: str, scene: Scene, image: int) -> None:
        """Count one caption's statements about a scene."""
        graded, facts = grade(scene, text), parse(text)
        stated, mentioned = graded.stated.total(), len(facts.things) + len(facts.signs)
        self.ratios.add((name, "precision", ""), image, graded.correct.total(), stated)
        self.ratios.add((name, "recall", ""), image, graded.recalled.total(), graded.expected.total())
        self.ratios.add((name, "hallucinated", ""), image, graded.hallucinated)
        self.ratios.add((name, "chair_i", ""), image, graded.hallucinated, mentioned)
        self.ratios.add((name, "chair_s", ""), image, graded.hallucinated > 0)
        self.ratios.add((name, "wrong", ""), image, stated - graded.correct.total())

    def _add_sentences(
        self, name: str, text: str, truths: Sequence[float | None], scene: Scene | None, image: int
    ) -> None:
        """Count one caption's sentences by the model that checked them, and beside it by its scene, if known."""
        known = [value for value in truths if value is not None]
        sentences = split_sentences(text)
        if len(known) != len(sentences):
            self.systems[name].unanswered += 1
            return
        self.systems[name].checked += 1
        holds = [value >= TRUE_FROM for value in known]
        self.ratios.add((name, "sentence_true", ""), image, sum(holds), len(holds))
        self.ratios.add((name, "sentence_wrong", ""), image, len(holds) - sum(holds))
        self.ratios.add((name, "sentence_probability", ""), image, sum(known), len(known))
        if scene is None:
            return
        truly = [is_true(scene, sentence) for sentence in sentences]
        pairs = [(held, true) for held, true in zip(holds, truly, strict=True) if true is not None]
        self.ratios.add((name, "sentence_scene_true", ""), image, sum(true for _, true in pairs), len(pairs))
        self.ratios.add((name, "sentence_scene_wrong", ""), image, sum(not true for _, true in pairs))
        self.ratios.add((name, "sentence_agreement", ""), image, sum(held == true for held, true in pairs), len(pairs))


def _example(name: str, graded: GradedImage) -> ShownCaption:
    """A system's first caption of an image, with its answers."""
    caption = graded.captions[name][0]
    by_kind = [
        (question.kind, caption.answers[question.id]) for question in graded.questions if question.id in caption.answers
    ]
    answers = tuple(ShownAnswer(kind, answer.right, answer.abstained, answer.scored) for kind, answer in by_kind)
    said = graded.open_ended.get(name, ())
    first = [each for each in said if each.caption == said[0].caption]
    in_words = tuple(ShownWords(each.question, each.said, each.accepted) for each in first)
    return ShownCaption(graded.key, name, None if name == "blind" else caption.text, answers, in_words)
