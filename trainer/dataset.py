"""Training examples: images by reference, with questions for a quiz; the order depends on the step only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from fsspec.core import url_to_fs

from ..errors import ArtifactMismatch, BadInput
from ..manifests.artifact import Artifact
from ..manifests.fingerprint import fingerprint
from ..manifests.shards import InputShard, Row, RowReader, expand, input_artifact, join, uid_of
from ..manifests.status import Status
from ..models.quiz import Question
from ..models.tiny.world.scenes import Scene
from ..stages.questions.grade import kept_questions, scene_of
from ..stages.questions.screen import QUESTIONS


@dataclass(frozen=True)
class Example:
    """An image and its questions, if any. The bytes stay in the tar ``url``: ``size`` bytes at ``offset``."""

    uid: str
    key: str
    url: str
    offset: int
    size: int
    questions: tuple[Question, ...]
    scene: Scene | None = None  # ground truth, if the image is rendered

    def read(self) -> bytes:
        """Encoded image. Raises ArtifactMismatch if the tar changed since it was listed."""
        fs, path = url_to_fs(self.url)
        data: bytes = fs.cat_file(path, self.offset, self.offset + self.size)
        if uid_of(data) != self.uid:
            raise ArtifactMismatch(f"{self.url}: {self.key!r} is not the image that was listed; the tar has changed")
        return data


@dataclass(frozen=True)
class ExampleList:
    """Training examples of a run.

    ``fingerprint``: of the questions, or without them of the images, for checkpoints; ``without``: number of rows left
    out, without a question or a valid image.
    """

    examples: tuple[Example, ...]
    fingerprint: str
    without: int


def load_examples(shards: str, questions: str | None, expected: str | None = None) -> ExampleList:
    """Images of ``shards`` that have questions; all valid images if ``questions`` is None.

    ``expected``: required fingerprint of the questions, or of the images without questions. Raises BadInput if there is
    nothing to train on or the fingerprint differs, ArtifactMismatch if the questions are about other images.
    """
    if questions is None:
        return _images_alone(shards, expected)
    artifact = Artifact.open(questions)
    if expected is not None and artifact.fingerprint != expected:
        raise BadInput(
            f"{questions}: its fingerprint is {artifact.fingerprint}, not {expected}; these questions were written or "
            "screened otherwise: give the folder that was meant, or fix `data.fingerprint`"
        )
    source = input_artifact(shards)
    images = artifact.config["semantic"].get("input")
    if source is not None and images is not None and source.fingerprint != images:
        raise ArtifactMismatch(
            f"{questions}: made of images with fingerprint {images}, {shards} has {source.fingerprint}; "
            "give the shards that the questions are about"
        )
    examples: list[Example] = []
    without = 0
    for shard in join(expand(shards), {QUESTIONS: artifact}):
        for row in RowReader(shard):
            kept = kept_questions(row.beside[QUESTIONS])
            example = _example(shard, row, tuple(kept)) if kept else None
            examples += [] if example is None else [example]
            without += example is None
    if not examples:
        raise BadInput(f"{questions}: none of the {without} images has a question to ask; screen with other thresholds")
    return ExampleList(tuple(examples), artifact.fingerprint, without)


def _images_alone(shards: str, expected: str | None) -> ExampleList:
    """Images without questions. Tars of other tools have no fingerprint: it is computed from their images' uids."""
    rows = [_example(shard, row, ()) for shard in expand(shards) for row in RowReader(shard)]
    examples = tuple(example for example in rows if example is not None)
    if not examples:
        raise BadInput(f"{shards}: none of its {len(rows)} rows is an image to train on")
    source = input_artifact(shards)
    actual = (
        source.fingerprint if source is not None else fingerprint({"images": [example.uid for example in examples]})
    )
    if expected is not None and actual != expected:
        raise BadInput(
            f"{shards}: the images' fingerprint is {actual}, not {expected}; give the shards that were meant, or fix "
            "`data.fingerprint`"
        )
    return ExampleList(examples, actual, len(rows) - len(examples))


def _example(shard: InputShard, row: Row, questions: tuple[Question, ...]) -> Example | None:
    """Reference to a row's image; None without a valid image."""
    if row.status is not Status.OK or row.image is None or row.uid is None:
        return None
    return Example(row.uid, row.key, shard.url, row.offset, len(row.image), questions, scene_of(row))


@dataclass(frozen=True)
class PromptSampler:
    """Sampler of each step's examples: every epoch is a new permutation; steps may cross epochs."""

    count: int
    batch: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """Example indices of ``step``, counted from 0; depends on the step only."""
        first = step * self.batch
        return [
            _permutation(self.count, self.seed, at // self.count)[at % self.count]
            for at in range(first, first + self.batch)
        ]

    def sample(self, step: int) -> list[tuple[int, int]]:
        """Pairs of :meth:`indices` and previous occurrences in the step (above 0 only if a batch exceeds the data)."""
        seen: Counter[int] = Counter()
        prompts = []
        for index in self.indices(step):
            prompts.append((index, seen[index]))
            seen[index] += 1
        return prompts


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Sequence[int]:
    return Random(f"epoch:{seed}:{epoch}").sample(range(count), count)
