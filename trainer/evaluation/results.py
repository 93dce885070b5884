"""Results of an evaluation and of a comparison, as dataclasses with a lossless JSON form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import JsonValue, TypeAdapter, ValidationError

from ...errors import BadInput
from .bootstrap import NOTHING, Estimate
from .text_statistics import TextStatistics


class JsonForm:
    """Mixin for conversion to and from JSON-ready dictionaries."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form that :meth:`from_dict` reads back to an equal value."""
        form: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return form

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read a value of :meth:`to_dict`. Raises BadInput with the first missing or wrong field."""
        try:
            value: Self = TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or cls.__name__.lower()
            raise BadInput(f"{field}: {first['msg']}; give the JSON that capipe eval wrote") from None
        return value


def json_ready(settings: Mapping[str, Any]) -> dict[str, JsonValue]:
    """``settings`` after a JSON round trip: tuples become lists. Raises TypeError for values without a JSON form."""
    ready: dict[str, JsonValue] = json.loads(json.dumps(dict(settings)))
    return ready


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionAccuracy:
    """Answers to presentations with the right option in position ``place`` (0 is the first)."""

    place: int
    right: int
    scored: int

    @property
    def accuracy(self) -> float:
        return self.right / self.scored


@dataclass(frozen=True)
class Quiz:
    """Quiz results from a system's captions.

    A question's score is the share of its scored presentations answered right, averaged over the captions of the image;
    ``accuracy``: mean over questions. ``unscored``: number of questions without a score from any caption, in no figure.
    """

    accuracy: Estimate
    best: Estimate  # with the best caption for each question ("best of n" of Prism and CapRL)
    abstained: Estimate
    by_kind: dict[str, Estimate]
    by_place: tuple[PositionAccuracy, ...]
    unscored: int
    invented: Estimate = NOTHING  # answers that an absent thing is there, among questions about such things
    score: Estimate = NOTHING  # CaptionQA's: to abstain counts more than a guess; see stages/questions/answer_scores.py


@dataclass(frozen=True)
class Truth:
    """Captions compared with the true scenes; all but ``hallucinated`` are shares.

    ``chair_i`` and ``chair_s`` are named after CHAIR (Rohrbach et al. 2018), per instance and per caption.
    """

    captions: int
    precision: Estimate  # share of stated attributes that are true
    recall: Estimate  # share of true attributes that are stated
    hallucinated: Estimate  # objects and signs not in the scene, per caption
    chair_i: Estimate  # share of mentioned objects and signs not in the scene
    chair_s: Estimate  # share of captions with any of these
    wrong: Estimate = NOTHING  # stated attributes that are false, per caption


@dataclass(frozen=True)
class Retrieval:
    """Recall at k, by k: share of captions that retrieve their own image from the ``gallery``."""

    gallery: int
    captions: int
    recall: dict[int, Estimate]


@dataclass(frozen=True)
class Judged:
    """Scores of a system's captions by other models; empty estimates without such a model.

    ``cosine``: of caption and image features, as in Luo, Song and Ma; the model may be the reward's own.
    ``logp``: mean natural log-probability of a token under a language model; perplexity is exp(-logp).
    """

    cosine: Estimate
    logp: Estimate


@dataclass(frozen=True)
class Sentences:
    """Captions checked sentence by sentence by a vision-language model, which is right itself only so far.

    ``captions``: those with an answer about every sentence; ``unanswered``: others, in no figure. A sentence is true
    from a probability of 0.5. By the scene, where it is known, a sentence counts if it states anything recognised.
    """

    captions: int
    unanswered: int
    true: Estimate  # share of sentences, the precision of DCScore with sentences as its units
    wrong: Estimate  # sentences that are not true, per caption
    probability: Estimate  # mean over sentences
    scene_true: Estimate  # share of sentences by the scene
    scene_wrong: Estimate  # per caption, by the scene
    agreement: Estimate  # share of sentences of which model and scene say the same


@dataclass(frozen=True)
class OpenEnded:
    """Open-ended questions, answered in words from a system's captions; all figures but ``unanswered`` are shares.

    A question's score is the mean over the captions of the image. ``unanswered``: answers that the model declined to
    give, and failed requests, in no figure. Definitions: stages/questions/answer_scores.py.
    """

    unanswered: int
    relaxed: Estimate  # relaxed accuracy of ChartQA
    scaled: Estimate  # the same at the scales that CapRL tries for charts
    anls: Estimate
    abstained: Estimate


@dataclass(frozen=True)
class System:
    """Figures of one prompt's captions, or of one control.

    ``samples``: largest number of captions of an image. ``excluded``: captions in no figure, by status. ``truth``: None
    without known scenes or captions to compare with them; ``text``: None for blind; ``retrieval``, ``judged``,
    ``sentences``: None without such a model; ``open_ended``: None without such questions.
    """

    name: str
    samples: int
    captions: int
    excluded: dict[str, int]
    quiz: Quiz
    truth: Truth | None
    text: TextStatistics | None
    retrieval: Retrieval | None = None
    judged: Judged | None = None
    sentences: Sentences | None = None
    open_ended: OpenEnded | None = None


@dataclass(frozen=True)
class Caution:
    """A warning about the figures: ``kind``, machine-readable; ``text``, for people; the ``figures`` concerned.

    Kinds: ``cannot_read``, ``prefers_places``, ``reward_reader`` (the reader was the training reward's), ``too_long``
    (captions that exceed the reader's context).
    """

    kind: str
    text: str
    figures: dict[str, float]


@dataclass(frozen=True)
class ShownAnswer:
    """Answers to one question, counted in presentations."""

    kind: str
    right: int
    abstained: int
    scored: int


@dataclass(frozen=True)
class ShownWords:
    """An answer in words (None: declined, or failed) to an open-ended question, and what is accepted."""

    question: str
    said: str | None
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class ShownCaption:
    """A system's first caption of an image, with the answers from it. ``text``: None for blind."""

    key: str
    system: str
    text: str | None
    answers: tuple[ShownAnswer, ...]
    in_words: tuple[ShownWords, ...] = ()


@dataclass(frozen=True)
class EvaluationReport(JsonForm):
    """A whole evaluation. ``systems``: the captioner's prompts first, then the controls.

    ``excluded``: rows in no figure, by reason. ``unscored``: questions without a score from some system.
    """

    images: int
    rows: int
    questions: int
    unscored: int
    excluded: dict[str, int]
    settings: dict[str, JsonValue]
    resamples: int
    seed: int
    systems: tuple[System, ...]
    examples: tuple[ShownCaption, ...]
    warnings: tuple[Caution, ...] = ()


# --- two runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Accuracies on the same questions; ``difference``: second - first; ``p``: two-sided, None without an interval."""

    first: Estimate
    second: Estimate
    difference: Estimate
    p: float | None


@dataclass(frozen=True)
class Side:
    """A compared run and its system."""

    name: str
    system: str
    settings: dict[str, JsonValue]


@dataclass(frozen=True)
class LeftOut:
    """Items not compared: images in one run only; on common images, questions in one run only or unscored."""

    images_first: int
    images_second: int
    questions_first: int
    questions_second: int
    questions_unscored: int


@dataclass(frozen=True)
class Comparison(JsonForm):
    """Comparison of two runs on common images and questions."""

    reader: str
    first: Side
    second: Side
    images: int
    questions: int
    left_out: LeftOut
    overall: Difference
    by_kind: dict[str, Difference]
    resamples: int
    seed: int
