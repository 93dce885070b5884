"""Checks before an evaluation: captions fit the reader's context; the reader was not the captioner's reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ....errors import BadInput
from ....manifests.artifact import Artifact
from ....models.context_check import Count, context_of, counter_of, room_of, telling
from ....models.engines.loading import EngineConfig, ModelIdentity, same_model
from ....models.quiz import Question, self_oracle
from ....models.reader import ReaderConfig
from ....stages.questions import open_ended
from ....stages.questions.grade import kept_questions, open_questions
from ....stages.questions.open_ended import OpenQuestion
from ....trainer.evaluation.results import Caution

MOST_TOO_LONG = 0.1  # share of the captions; a single one is always accepted

Text = tuple[str, str, int | None]  # the row's key, a caption, and its token count by the captioner


@dataclass(frozen=True)
class Lengths:
    """Caption lengths for a reader: the most tokens of a caption that fits, and how many of ``all`` do not."""

    longest: int = 0
    all: int = 0
    too_long: int = 0
    first: str = ""  # location of the first of those
    room: int = 0

    @property
    def cautions(self) -> list[Caution]:
        if not self.too_long:
            return []
        text = (
            f"{self.too_long} of {self.all} captions have more than the {self.room} tokens that the reader's context "
            f"leaves for them (the first: {self.first}); they are unscored and in no figure"
        )
        return [Caution("too_long", text, {"too_long": self.too_long, "captions": self.all, "room": self.room})]


class Asking(Protocol):
    """A reader, its configuration, and its questions (:func:`asked_of`, :func:`opened_of`)."""

    @property
    def engine(self) -> EngineConfig: ...

    @property
    def reader(self) -> ReaderConfig: ...

    @property
    def asked(self) -> tuple[Question, ...]: ...

    @property
    def opened(self) -> tuple[OpenQuestion, ...]: ...

    @property
    def identity(self) -> ModelIdentity: ...


def check_limit(stage: Asking, max_tokens: int) -> None:
    """Raise BadInput if a caption of the maximum length would not fit the reader.

    The reader's token count is assumed to equal the captioner's; the captions are measured once they exist.
    """
    engine = stage.engine
    try:
        context = context_of(engine)
    except BadInput:
        if engine.is_http:  # it may be started while captions are written; checked again before use
            return
        raise
    if context is None or not (stage.asked or stage.opened):
        return
    left = _left(stage, context, counter_of(engine))
    if left < max_tokens:
        raise too_long(engine.model or engine.kind, context, max_tokens, left, "--max-tokens: captions")


def check_captions(stage: Asking, texts: Iterable[Text]) -> Lengths:
    """Compare the captions' actual lengths with the reader's context. Raises BadInput if many do not fit."""
    engine = stage.engine
    context = context_of(engine)
    if context is None or not (stage.asked or stage.opened):
        return Lengths()
    count = counter_of(engine)
    left = _left(stage, context, count)
    seen = over = most = size_of_longest = 0
    longest, first = "", ""
    for key, text, n_tokens in texts:
        seen += 1
        size = len(text.encode())
        if size > left and (tokens := (n_tokens if engine.is_http and n_tokens else count(text))) > left:
            over += 1
            most, first = max(most, tokens), first or f"row {key!r}, {tokens} tokens"
        elif size > size_of_longest:
            longest, size_of_longest = text, size
    if over > 1 and over > MOST_TOO_LONG * seen:
        raise too_long(engine.model or engine.kind, context, most, left, f"{over} of {seen} captions")
    return Lengths(count(longest) if longest and not engine.is_http else 0, seen, over, first, left)


def _left(stage: Asking, context: int, count: Count) -> int:
    """Tokens left for a caption beside the longest question of either kind, of which there is at least one."""
    lefts = [room_of(context, stage.reader, stage.asked, count)] if stage.asked else []
    lefts += [open_ended.room_of(context, stage.opened, count)] if stage.opened else []
    return min(lefts)


def caption_texts(captions: Artifact) -> Iterator[Text]:
    """Texts of existing captions."""
    for shard in captions.committed():
        for row in captions.read_rows(shard):
            for caption in row["captions"] or []:
                yield row["key"], caption["text"] or "", caption["n_tokens"]


def too_long(reader: str, context: int | None, tokens: int, left: int, whose: str = "captions") -> BadInput:
    return BadInput(
        f"{whose} of up to {tokens} tokens, and {reader} has room for {max(left, 0)} beside the longest question (its "
        f"context is {context}): write shorter captions (--max-tokens), or take a reader with a longer context"
    )


def rewarded_by(captions: Artifact, stage: Asking) -> list[Caution]:
    """A caution if the captioner's checkpoint records that it was trained with this reader as reward.

    Nothing is known about captioners that are not checkpoints of ours, or that were moved to a server.
    """
    from ....trainer.checkpoint import FACTS, read_facts

    captioner = captions.config["run"].get("model")
    if not isinstance(captioner, str) or not (Path(captioner).expanduser() / FACTS).is_file():
        return []
    reader = read_facts(Path(captioner).expanduser()).figures.get("reader")
    if not reader or not same_model(ModelIdentity(**reader), stage.identity):
        return []
    text = (
        "the captioner was trained with this very reader as its reward, and may have learnt what this one likes; "
        "evaluate with another"
    )
    return [Caution("reward_reader", text, {})]


def oracle_texts(questions: Artifact) -> Iterator[Text]:
    """The control caption with all answers, for every image."""
    for key, asked in _questions(questions):
        yield key, self_oracle(asked), None


def asked_of(questions: Artifact) -> tuple[Question, ...]:
    """The questions that the checks need."""
    return telling(question for _, asked in _questions(questions) for question in asked)


def opened_of(questions: Artifact) -> tuple[OpenQuestion, ...]:
    """The open-ended questions that the checks need."""
    return open_ended.longest(
        question
        for shard in questions.committed()
        for row in questions.read_rows(shard)
        for question in open_questions(row)
    )


def _questions(artifact: Artifact) -> Iterator[tuple[str, list[Question]]]:
    for shard in artifact.committed():
        for row in artifact.read_rows(shard):
            if asked := kept_questions(row):
                yield row["key"], asked
