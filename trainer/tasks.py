"""What is trained on: images with their questions, by reference, in an order that is a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from fsspec.core import url_to_fs

from ..errors import ArtifactMismatch, BadInput
from ..manifests.artifact import Artifact
from ..manifests.shards import RowReader, expand, input_artifact, join, uid_of
from ..manifests.status import Status
from ..models.quiz import Question
from ..models.tiny.world import Scene
from ..stages.grade import kept_questions, scene_of
from ..stages.screen import QUESTIONS


@dataclass(frozen=True)
class Task:
    """An image and its questions. The bytes stay in their tar: ``size`` of them at ``offset`` of ``url``."""

    uid: str
    key: str
    url: str
    offset: int
    size: int
    questions: tuple[Question, ...]
    scene: Scene | None = None  # the truth, where the image is a rendered one

    def read(self) -> bytes:
        """The encoded image. Raises ArtifactMismatch where the tar changed since it was listed."""
        fs, path = url_to_fs(self.url)
        data: bytes = fs.cat_file(path, self.offset, self.offset + self.size)
        if uid_of(data) != self.uid:
            raise ArtifactMismatch(f"{self.url}: {self.key!r} is not the image that was listed; the tar has changed")
        return data


@dataclass(frozen=True)
class TaskList:
    """``fingerprint``: of the questions, for checkpoints; ``without``: images that have no question to ask."""

    tasks: tuple[Task, ...]
    fingerprint: str
    without: int


def load_tasks(shards: str, questions: str, expected: str | None = None) -> TaskList:
    """Images of ``shards`` with what may be asked about them. ``expected``: the fingerprint the questions must have.

    Raises BadInput where there is nothing to ask or the questions are others than expected, ArtifactMismatch where they
    are not about these images.
    """
    artifact = Artifact.open(questions)
    if expected is not None and artifact.fingerprint != expected:
        raise BadInput(
            f"{questions}: its fingerprint is {artifact.fingerprint}, not {expected}; these questions were written or "
            "screened otherwise: give the folder that was meant, or mend `data.fingerprint`"
        )
    source = input_artifact(shards)
    made_of = artifact.config["semantic"].get("input")
    if source is not None and made_of is not None and source.fingerprint != made_of:
        raise ArtifactMismatch(
            f"{questions}: made of images with fingerprint {made_of}, {shards} has {source.fingerprint}; "
            "give the shards that the questions are about"
        )
    tasks: list[Task] = []
    without = 0
    for shard in join(expand(shards), {QUESTIONS: artifact}):
        for row in RowReader(shard):
            asked = kept_questions(row.beside[QUESTIONS])
            if row.status is not Status.OK or row.image is None or row.uid is None or not asked:
                without += 1
                continue
            where = (shard.url, row.offset, len(row.image))
            tasks.append(Task(row.uid, row.key, *where, tuple(asked), scene_of(row)))
    if not tasks:
        raise BadInput(f"{questions}: none of the {without} images has a question to ask; screen with other thresholds")
    return TaskList(tuple(tasks), artifact.fingerprint, without)


@dataclass(frozen=True)
class Schedule:
    """Which tasks a step takes: each epoch is a new permutation, and steps run on across epochs."""

    count: int
    batch: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """The tasks of ``step``, counted from 0; the same ones whenever and wherever it is asked."""
        first = step * self.batch
        return [
            _permutation(self.count, self.seed, at // self.count)[at % self.count]
            for at in range(first, first + self.batch)
        ]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Sequence[int]:
    return Random(f"epoch:{seed}:{epoch}").sample(range(count), count)
