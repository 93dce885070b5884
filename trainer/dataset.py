"""Training examples: images by reference, with questions for a quiz or captions to imitate.

The order depends on the step only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from ..errors import ArtifactMismatch, BadInput
from ..manifests.artifact import Artifact
from ..manifests.files.stores import filesystem
from ..manifests.fingerprint import fingerprint
from ..manifests.shards import InputShard, Row, RowReader, expand, input_artifact, join, uid_of
from ..manifests.status import Status
from ..models.quiz import Question
from ..models.tiny.world.scenes import Scene
from ..stages.questions.grade import CAPTIONS, kept_questions, scene_of
from ..stages.questions.screen import QUESTIONS


@dataclass(frozen=True)
class Example:
    """An image, its questions and the captions to imitate, if any.

    The bytes stay in the tar ``url``: ``size`` bytes at ``offset``.
    """

    uid: str
    key: str
    url: str
    offset: int
    size: int
    questions: tuple[Question, ...]
    scene: Scene | None = None  # ground truth, if the image is rendered
    captions: tuple[str, ...] = ()

    def read(self) -> bytes:
        """Encoded image. Raises ArtifactMismatch if the tar changed since it was listed."""
        fs, path = filesystem(self.url)
        data = fs.read(path, self.offset, self.offset + self.size)
        if uid_of(data) != self.uid:
            raise ArtifactMismatch(f"{self.url}: {self.key!r} is not the image that was listed; the tar has changed")
        return data


@dataclass(frozen=True)
class ExampleList:
    """Training examples of a run.

    ``fingerprint``: of the questions or captions, or without them of the images, for checkpoints; ``without``: number
    of rows left out, without a question, a caption or a valid image.
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
    examples: list[Example] = []
    without = 0
    for shard, row in _joined(shards, artifact, QUESTIONS, "questions"):
        kept = kept_questions(row.beside[QUESTIONS])
        example = _example(shard, row, tuple(kept)) if kept else None
        examples += [] if example is None else [example]
        without += example is None
    if not examples:
        raise BadInput(f"{questions}: none of the {without} images has a question to ask; screen with other thresholds")
    return ExampleList(tuple(examples), artifact.fingerprint, without)


def load_captioned(shards: str, captions: str, name: str | None = None, expected: str | None = None) -> ExampleList:
    """Images of ``shards`` with captions to imitate, of the prompt ``name`` in an artifact of `capipe annotate`.

    All samples of the prompt count (``name#0``, ``name#1``, ...), but only captions whose own status is ok. Without
    ``name`` the artifact has one prompt. ``expected``: required fingerprint of the captions. Raises BadInput if there
    is nothing to imitate or the fingerprint differs, ArtifactMismatch if the captions are of other images.
    """
    artifact = Artifact.open(captions)
    if artifact.stage != "annotate":
        raise BadInput(f"{captions}: an artifact of stage {artifact.stage!r}; data.captions takes `capipe annotate`'s")
    if expected is not None and artifact.fingerprint != expected:
        raise BadInput(
            f"{captions}: its fingerprint is {artifact.fingerprint}, not {expected}; these captions were written "
            "otherwise: give the folder that was meant, or fix `data.fingerprint`"
        )
    chosen = _prompt_name(artifact, name)
    examples: list[Example] = []
    without = 0
    for shard, row in _joined(shards, artifact, CAPTIONS, "captions"):
        texts = _texts(row.beside[CAPTIONS], chosen)
        example = _example(shard, row, (), texts) if texts else None
        examples += [] if example is None else [example]
        without += example is None
    if not examples:
        raise BadInput(f"{captions}: none of the {without} images has a caption {chosen!r} that is ok; annotate again")
    return ExampleList(tuple(examples), artifact.fingerprint, without)


def _prompt_name(artifact: Artifact, name: str | None) -> str:
    """The prompt whose captions are imitated. Raises BadInput if there is no such one, or no name and several."""
    names = [known for known, _ in artifact.prompts()]
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        reason = f"data.prompt_name is {name!r}" if name else "which prompt's captions to imitate is not said"
        raise BadInput(f"{artifact.url}: {reason}; set data.prompt_name to one of {', '.join(names)}")
    return name


def _texts(beside: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A row's good captions of a prompt, all samples of it in order."""
    return tuple(
        entry["text"]
        for entry in beside["captions"] or []
        if entry["name"].partition("#")[0] == name and entry["status"] == Status.OK and entry["text"]
    )


def _joined(shards: str, artifact: Artifact, name: str, what: str) -> Iterator[tuple[InputShard, Row]]:
    """Rows of ``shards`` with those of ``artifact`` as companion ``name``.

    Raises ArtifactMismatch if the artifact was made of other images.
    """
    source = input_artifact(shards)
    images = artifact.config["semantic"].get("input")
    if source is not None and images is not None and source.fingerprint != images:
        raise ArtifactMismatch(
            f"{artifact.url}: made of images with fingerprint {images}, {shards} has {source.fingerprint}; "
            f"give the shards that the {what} are about"
        )
    for shard in join(expand(shards), {name: artifact}):
        for row in RowReader(shard):
            yield shard, row


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


def _example(
    shard: InputShard, row: Row, questions: tuple[Question, ...], captions: tuple[str, ...] = ()
) -> Example | None:
    """Reference to a row's image; None without a valid image."""
    if row.status is not Status.OK or row.image is None or row.uid is None:
        return None
    return Example(row.uid, row.key, shard.url, row.offset, len(row.image), questions, scene_of(row), captions)


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
        return _counted(self.indices(step))

    def refills(self, step: int, rounds: int) -> list[list[tuple[int, int]]]:
        """Examples that replace the step's, pairs as in :meth:`sample`: a list of ``rounds`` for each of its places.

        They depend on seed, step and place alone, so that any number of processes takes the same ones, and are images
        that the step does not have yet, while there are any.
        """
        own, most = self.indices(step), self.batch * rounds
        rng = Random(f"refills:{self.seed}:{step}")
        candidates, taken = rng.sample(range(self.count), min(self.count, most + self.batch)), set(own)
        others = [index for index in candidates if index not in taken] or candidates
        listed = [others[at % len(others)] for at in range(most)]
        further = _counted([*own, *listed])[self.batch :]
        return [further[place :: self.batch] for place in range(self.batch)]


def _counted(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Each index with the number of its previous occurrences."""
    seen: Counter[int] = Counter()
    counted = []
    for index in indices:
        counted.append((index, seen[index]))
        seen[index] += 1
    return counted


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Sequence[int]:
    return Random(f"epoch:{seed}:{epoch}").sample(range(count), count)
