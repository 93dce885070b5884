"""How well a vision-language model answers yes-or-no questions and checks statements about held-out scenes.

Measured by :mod:`....yes_no`, with its prompts and in both orders of its options, as areas under the ROC curve: of
questions about what is there or not, of sentences with one attribute changed, and of whole captions with one attribute
changed, by the sentences that a matching model (:mod:`.scorers`) is measured by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean

from ....engines.base import Engine, ImageInput
from ....engines.loading import EngineConfig, load_engine
from ....images.decode import ImageLimits, decode_rgb
from ....images.formats import ImageProblem
from ....scorers.base import Scorer, score_captions
from ....scorers.sentences import split_sentences
from ....yes_no import YesNo, YesNoConfig, YesNoReader
from ..texts.hard_negatives import sentence_pair
from ..texts.presence import PRESENCE_KINDS, Presence, sample_presence
from .scorers import BATCH, Subject, area_under_roc, seen_by, subjects

UNKNOWN = 0.5  # the probability that stands for no answer


@dataclass(frozen=True)
class Probe:
    """A held-out scene: questions of each kind, a true sentence and its false twin; captions are the subject's."""

    subject: Subject
    questions: tuple[Presence, ...]
    true: str
    false: str

    @property
    def captions(self) -> tuple[str, str]:
        """A true caption, and one with one attribute changed."""
        return self.subject.true, self.subject.changed.text


@dataclass(frozen=True)
class Truth:
    """Areas under the ROC curve: ``sentences``, true against false twins; ``least``, ``mean``: of captions' sentences.

    ``lowest``: share of the changed captions, of those with several sentences, whose lowest one is the changed one.
    """

    sentences: float
    least: float
    mean: float
    lowest: float


@dataclass(frozen=True)
class YesNoReport:
    """Areas under the ROC curve: of all ``questions`` and by kind, and of statements as in :class:`Truth`.

    ``unanswered``: share of all prompts without an answer, which count as a probability of 0.5.
    """

    questions: float
    sentences: float
    least: float
    mean: float
    lowest: float
    unanswered: float
    by_kind: dict[str, float]


def probes(count: int, seed: int) -> list[Probe]:
    """Held-out scenes with their questions and sentences, the same for the same arguments."""
    found = []
    for index, subject in enumerate(subjects(count, seed)):
        rng, scene = Random(f"yes_no:{seed}:{index}"), subject.sample.scene
        questions = tuple(sample_presence(scene, rng, kind) for kind in PRESENCE_KINDS)
        found.append(Probe(subject, questions, *sentence_pair(scene, rng)))
    return found


async def yes_no_report(model: str, count: int, seed: int, engine: str = "transformers") -> YesNoReport:
    """Metrics of a model, by name or folder, on ``count`` scenes."""
    loaded = await load_engine(EngineConfig(engine, model, concurrency=256))
    try:
        return await evaluate_yes_no(loaded, probes(count, seed))
    finally:
        await loaded.aclose()


async def evaluate_yes_no(engine: Engine, of: Sequence[Probe]) -> YesNoReport:
    """Metrics of a model behind an engine."""
    reader = YesNoReader(engine, YesNoConfig())
    images = [_image(engine, probe) for probe in of]
    asked = await asyncio.gather(
        *(reader.ask(image, [each.text for each in probe.questions]) for image, probe in zip(images, of, strict=True))
    )
    statements = [[probe.true, probe.false, *_sentences(probe)] for probe in of]
    checked = await asyncio.gather(
        *(reader.check(image, texts) for image, texts in zip(images, statements, strict=True))
    )
    answers = [answer for group in (*asked, *checked) for answer in group]
    truths = [
        {text: _probability(answer) for text, answer in zip(texts, group, strict=True)}
        for texts, group in zip(statements, checked, strict=True)
    ]
    pairs = [
        (question, _probability(answer))
        for probe, group in zip(of, asked, strict=True)
        for question, answer in zip(probe.questions, group, strict=True)
    ]
    by_kind = {kind: _area([pair for pair in pairs if pair[0].kind == kind]) for kind in PRESENCE_KINDS}
    truth = sentence_truth(of, truths)
    return YesNoReport(
        questions=_area(pairs),
        sentences=truth.sentences,
        least=truth.least,
        mean=truth.mean,
        lowest=truth.lowest,
        unanswered=sum(answer.probability is None for answer in answers) / len(answers),
        by_kind=by_kind,
    )


def scorer_truth(scorer: Scorer, of: Sequence[Probe]) -> Truth:
    """The same of a matching model, on the same sentences."""
    truths: list[dict[str, float]] = []
    for start in range(0, len(of), BATCH):
        batch = of[start : start + BATCH]
        pixels = [seen_by(scorer, probe.subject.sample.image) for probe in batch]
        asked = [(at, text) for at, probe in enumerate(batch) for text in (probe.true, probe.false, *_sentences(probe))]
        scores = score_captions(scorer, pixels, asked)
        found: list[dict[str, float]] = [{} for _ in batch]
        for (at, text), score in zip(asked, scores, strict=True):
            found[at][text] = score.score
        truths += found
    return sentence_truth(of, truths)


def sentence_truth(of: Sequence[Probe], truths: Sequence[dict[str, float]]) -> Truth:
    """Areas by how true each sentence of each probe is said to be."""
    by_caption = [
        [[truth[sentence] for sentence in split_sentences(caption)] for caption in probe.captions]
        for probe, truth in zip(of, truths, strict=True)
    ]
    several = [
        (probe.subject.changed.sentence, false)
        for probe, (_, false) in zip(of, by_caption, strict=True)
        if len(false) > 1
    ]
    return Truth(
        sentences=_rounded(
            [truth[probe.true] for probe, truth in zip(of, truths, strict=True)],
            [truth[probe.false] for probe, truth in zip(of, truths, strict=True)],
        ),
        least=_rounded([min(true) for true, _ in by_caption], [min(false) for _, false in by_caption]),
        mean=_rounded([mean(true) for true, _ in by_caption], [mean(false) for _, false in by_caption]),
        lowest=round(sum(scores.index(min(scores)) == wrong for wrong, scores in several) / max(1, len(several)), 4),
    )


def _image(engine: Engine, probe: Probe) -> ImageInput:
    """The image in the form that the engine expects."""
    sample = probe.subject.sample
    uid = f"{sample.scene.signature}-{sample.key}"
    if engine.grid is None:
        return ImageInput(uid, encoded=sample.image)
    pixels = decode_rgb(sample.image, engine.grid, ImageLimits())
    if isinstance(pixels, ImageProblem):
        raise ValueError(f"a rendered scene cannot be decoded: {pixels.reason}")
    return ImageInput(uid, pixels=pixels)


def _sentences(probe: Probe) -> list[str]:
    return [sentence for caption in probe.captions for sentence in split_sentences(caption)]


def _probability(answer: YesNo) -> float:
    return UNKNOWN if answer.probability is None else answer.probability


def _area(asked: Sequence[tuple[Presence, float]]) -> float:
    """Area for questions with their probabilities of yes; not a number where all have the same answer."""
    yes, no = ([probability for question, probability in asked if question.holds is holds] for holds in (True, False))
    return _rounded(yes, no) if yes and no else float("nan")


def _rounded(true: Sequence[float], false: Sequence[float]) -> float:
    return round(area_under_roc(true, false), 4)
