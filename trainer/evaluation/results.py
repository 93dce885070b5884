"""What an evaluation and a comparison say, as values that go to JSON and back unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import JsonValue, TypeAdapter, ValidationError

from ...errors import BadInput
from .bootstrap import Estimate
from .text_statistics import TextStatistics


class JsonForm:
    """The dictionary of JSON values that stands for a value of the class, and the way back."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form that :meth:`from_dict` reads back to an equal value."""
        form: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return form

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The value that :meth:`to_dict` wrote. Raises BadInput naming the first field that is missing or wrong."""
        try:
            value: Self = TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or cls.__name__.lower()
            raise BadInput(f"{field}: {first['msg']}; give the JSON that capipe eval wrote") from None
        return value


def json_ready(settings: Mapping[str, Any]) -> dict[str, JsonValue]:
    """``settings`` as JSON would give them back: tuples are lists. Raises TypeError for what JSON has no form of."""
    ready: dict[str, JsonValue] = json.loads(json.dumps(dict(settings)))
    return ready


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionAccuracy:
    """How presentations with the right option in ``place`` (0 is the first) were answered."""

    place: int
    right: int
    scored: int

    @property
    def accuracy(self) -> float:
        return self.right / self.scored


@dataclass(frozen=True)
class Quiz:
    """How well the questions are answered from a system's captions.

    A question's score is the share of its scored presentations that were answered right, averaged over the captions of
    the image; ``accuracy`` is the mean over questions. ``unscored`` questions have no score from any caption and are in
    no figure.
    """

    accuracy: Estimate
    best: Estimate  # of the best of the captions for each question ("best of n" of Prism and CapRL)
    abstained: Estimate
    by_kind: dict[str, Estimate]
    by_place: tuple[PositionAccuracy, ...]
    unscored: int


@dataclass(frozen=True)
class Truth:
    """Captions compared with scenes whose truth is known; all but ``hallucinated`` are shares.

    ``chair_i`` and ``chair_s`` are named after CHAIR (Rohrbach et al. 2018), per instance and per caption.
    """

    captions: int
    precision: Estimate  # of the attributes stated, those that are true
    recall: Estimate  # of the true attributes, those that are stated
    hallucinated: Estimate  # things and signs that are not there, per caption
    chair_i: Estimate  # of the things and signs mentioned, those that are not there
    chair_s: Estimate  # of the captions, those with any such


@dataclass(frozen=True)
class Retrieval:
    """How often captions find their own image among those of the ``gallery``: recall at k, by k."""

    gallery: int
    captions: int
    recall: dict[int, Estimate]


@dataclass(frozen=True)
class Judged:
    """What other models say of a system's captions; each may have no figure, where no such model was asked.

    ``cosine``: of a caption's and its image's features, as Luo, Song and Ma measure; the model may be the reward's own.
    ``logp``: mean natural log-probability of a token under a language model; its perplexity is exp(-logp).
    """

    cosine: Estimate
    logp: Estimate


@dataclass(frozen=True)
class System:
    """The figures of one prompt's captions, or of one control.

    ``samples``: the most captions that an image has. ``excluded``: captions that are in no figure, by status.
    ``truth`` is None where no scene is known or there is no caption to hold against it, ``text`` is None for blind,
    ``retrieval`` and ``judged`` where no model was asked.
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


@dataclass(frozen=True)
class Caution:
    """What makes the figures doubtful: ``kind`` for machines, ``text`` for people, the ``figures`` that it is about.

    Kinds: ``cannot_read``, ``prefers_places``, ``reward_reader`` (the reader is the one that training was rewarded by),
    ``too_long`` (captions that the reader's context does not hold).
    """

    kind: str
    text: str
    figures: dict[str, float]


@dataclass(frozen=True)
class ShownAnswer:
    """How one question fared, in presentations."""

    kind: str
    right: int
    abstained: int
    scored: int


@dataclass(frozen=True)
class ShownCaption:
    """The first caption of a system for one image and what was answered from it. ``text`` is None for blind."""

    key: str
    system: str
    text: str | None
    answers: tuple[ShownAnswer, ...]


@dataclass(frozen=True)
class EvaluationReport(JsonForm):
    """A whole evaluation. ``systems``: the captioner's prompts first, then the controls.

    ``excluded``: rows that are in no figure, by reason. ``unscored``: questions that some system has no score for.
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
    """Accuracies on the same questions; ``difference`` is second minus first, ``p`` two-sided, None as its interval."""

    first: Estimate
    second: Estimate
    difference: Estimate
    p: float | None


@dataclass(frozen=True)
class Side:
    """A run under comparison, and which of its systems is compared."""

    name: str
    system: str
    settings: dict[str, JsonValue]


@dataclass(frozen=True)
class LeftOut:
    """What is not compared: images in one run only; on common images, questions in one run only or without a score."""

    images_first: int
    images_second: int
    questions_first: int
    questions_second: int
    questions_unscored: int


@dataclass(frozen=True)
class Comparison(JsonForm):
    """Two runs on what they have in common."""

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
