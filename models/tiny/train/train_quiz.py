"""Training of the quiz models: readers from scratch, the teacher from the captioner's weights.

Each lesson is a row in which every branch attends to the shared prefix and itself (a block mask), at the positions it
would have alone: training computes the same as an engine, but each prefix only once for all its branches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from ...yes_no import OPTIONS
from .architectures import IMAGE_TOKENS, export_folder
from .batches import picture
from .optim import build_optimizers, set_rate
from .schedule import Progress, Schedule
from .texts.quiz_curriculum import FORMS, QuizText, Statement
from .texts.tokenizer import END, IMAGE, START, VISION_END, VISION_START
from .vision import image_tokens

IMAGE_STEPS = 4  # positions that an image's 16 tokens take up: the longer side of its grid
CHUNKS = 4  # a batch is split into this many parts of similar length
LM_WEIGHT = 0.3  # weight of the loss on captions and questions themselves
GUIDE_WEIGHT = 0.5  # weight of the auxiliary loss on a middle layer
LESSON, QUESTION, FORM_BASE = 0, 1, 2  # parts: tokens of the prefix, of a question, of an answer (+ its form)

Curriculum = Callable[[Random, int], QuizText]


@dataclass(frozen=True)
class QuizSequence:
    """A tokenized lesson. ``branch``: 0 for the prefix, then 1, 2, …; ``part``: the kind of each token, for the loss.

    ``means``: for a letter, the first token of the choice it stands for; for what follows a token of a statement, yes
    or no, whether all of it up to there is true; -1 for all other tokens.
    """

    ids: list[int]
    branch: list[int]
    part: list[int]
    means: list[int]
    positions: Tensor  # (3, tokens)
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Curricula:
    """``make`` generates a lesson from an rng and a level, 1 to ``levels``; a batch has ``size`` lessons."""

    make: Curriculum
    size: int
    levels: int


class Counts(NamedTuple):
    """Token counts by part: ``all``, and ``told``: without the end tokens, which carry no content.

    ``meant``: number of tokens at which a guided layer is to say something.
    """

    all: Counter[int]
    told: Counter[int]
    meant: int


class QuizTrainer:
    """Trainer on lessons; ``tower``: the vision encoder, None for a text model.

    ``guided``: number of layers trained to give the answer in words before the others find its letter (deep
    supervision, arXiv 1409.5185). Without it, the layers that find the answer leave none to find the letter. Along a
    statement, the same layers are to say at each of its tokens whether it is true so far: as of replaced tokens (arXiv
    2003.10555), much more is learnt of each statement than of its one answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        schedule: Schedule,
        curriculum: Curricula,
        guided: int | None = None,
    ) -> None:
        self.guided = guided
        self.model, self.tokenizer, self.schedule, self.curriculum = model, tokenizer, schedule, curriculum
        self.decoder = getattr(model.model, "language_model", model.model)
        self.tower = getattr(model.model, "visual", None)
        self.end: int = tokenizer.convert_tokens_to_ids(END)
        self.optimizers = build_optimizers(model, schedule.lr, schedule.adam_lr)
        self.progress = Progress()

    def run(self, log: Callable[[str], None]) -> Iterator[Progress]:
        """Train, yielding after every step (so that the caller may evaluate, save or stop)."""
        schedule, start = self.schedule, time.monotonic() - self.progress.seconds
        while schedule.progress(self.progress.step, self.progress.seconds) < 1:
            level = self.progress.level
            rng = Random(f"lessons:{schedule.seed}:{self.progress.step}")
            rows = [encode(self.curriculum.make(rng, level), self.tokenizer, rng) for _ in range(self.curriculum.size)]
            report = self.step(rows, schedule.rate(self.progress.step, self.progress.seconds))
            right, seconds = report.get("letter_right", report.get("words_right", 0.0)), time.monotonic() - start
            self.progress = schedule.advance(self.progress, seconds, right, self.curriculum.levels)
            if self.progress.step % 50 == 0 or self.progress.step <= 3:
                figures = " ".join(f"{name} {value:.4f}" for name, value in report.items())
                log(f"step {self.progress.step} {self.progress.seconds:.0f}s level {level} {figures}")
            yield self.progress

    def step(self, rows: list[QuizSequence], rate: float) -> dict[str, float]:
        """One update of all weights; returns losses and accuracies by name, over the batch."""
        rows = sorted(rows, key=lambda row: len(row.ids))
        size = -(-len(rows) // CHUNKS)
        counts = self.count(rows)
        report: dict[str, float] = {}
        for chunk in (rows[at : at + size] for at in range(0, len(rows), size)):
            loss, figures = self._loss(chunk, counts)
            loss.backward()
            report = {name: report.get(name, 0.0) + value for name, value in figures.items()}
        report["norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad()
        return report

    def count(self, rows: list[QuizSequence]) -> Counts:
        """Token counts of a batch by part."""
        pairs = [pair for row in rows for pair in zip(row.part, row.ids, strict=True)]
        told = Counter(part for part, token in pairs if token != self.end)
        meant = sum(token >= 0 for row in rows for token in row.means)
        return Counts(Counter(part for part, _ in pairs), told, meant)

    def _loss(self, rows: list[QuizSequence], counts: Counts) -> tuple[Tensor, dict[str, float]]:
        """A chunk's share of the batch's loss: each kind of token is averaged over the whole batch."""
        middle: list[Tensor] = []
        with self._watched(middle):
            hidden, ids, part, same = self.hidden(rows)
        logits = self.model.lm_head(hidden[:, :-1][same])
        targets, parts = ids[:, 1:][same], part[:, 1:][same]
        losses = functional.cross_entropy(logits, targets, reduction="none")
        total = torch.zeros(())
        figures: dict[str, float] = {}
        for index in range(FORM_BASE + len(FORMS)):
            mine = parts == index
            if not mine.any():
                continue
            loss = losses[mine].sum() / counts.all[index]
            if index < FORM_BASE:
                total = total + LM_WEIGHT / 2 * loss
                continue
            total = total + loss
            form: str = FORMS[index - FORM_BASE]
            figures[form] = loss.item()
            said = mine & (targets != self.end)
            right = (logits[said].argmax(-1) == targets[said]).float().sum() / counts.told[index]
            figures[f"{form}_right"] = right.item()
        if middle:
            loss = self._guide(middle[0], rows) / max(1, counts.meant)
            figures["guide"] = loss.item()
            total = total + GUIDE_WEIGHT * loss
        return total, figures

    @contextmanager
    def _watched(self, middle: list[Tensor]) -> Iterator[None]:
        """Append the output of the last guided layer to ``middle``."""
        if self.guided is None:
            yield
            return
        handle = self.decoder.layers[self.guided - 1].register_forward_hook(
            lambda module, inputs, output: middle.append(output)
        )
        try:
            yield
        finally:
            handle.remove()

    def _guide(self, middle: Tensor, rows: list[QuizSequence]) -> Tensor:
        """Summed loss of ``means``, decoded from ``middle`` (rows, tokens, width) at the tokens before them."""
        said = [
            (row, column - 1, token)
            for row, sequence in enumerate(rows)
            for column, token in enumerate(sequence.means)
            if token >= 0
        ]
        if not said:
            return torch.zeros(())
        at, before, tokens = torch.tensor(said).unbind(1)
        logits = self.model.lm_head(self.decoder.norm(middle[at, before]))
        return functional.cross_entropy(logits, tokens, reduction="sum")

    def hidden(self, rows: list[QuizSequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Last hidden states (rows, tokens, width), token ids and parts (rows, tokens), and a mask of targets.

        The mask is (rows, tokens - 1): true where the preceding token is of the same branch and thus predicts it.
        """
        width = max(len(row.ids) for row in rows)
        ids, part = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        branch = torch.full((len(rows), width), -1)
        positions = torch.zeros(3, len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            length = len(row.ids)
            ids[at, :length], part[at, :length] = torch.tensor(row.ids), torch.tensor(row.part)
            branch[at, :length], positions[:, at, :length] = torch.tensor(row.branch), row.positions
        embedded = self._embedded(rows, ids)
        where = positions if self.tower is not None else positions[0]
        mask = {"full_attention": visible(branch)}
        hidden = self.decoder(
            inputs_embeds=embedded, position_ids=where, attention_mask=mask, use_cache=False
        ).last_hidden_state
        same = (branch[:, 1:] == branch[:, :-1]) & (branch[:, 1:] >= 0)
        return hidden, ids, part, same

    def _embedded(self, rows: list[QuizSequence], ids: Tensor) -> Tensor:
        embedded: Tensor = self.decoder.embed_tokens(ids)
        if self.tower is None or all(row.pixels is None for row in rows):
            return embedded
        pixels = torch.from_numpy(np.stack([row.pixels for row in rows if row.pixels is not None]))
        image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        seen = image_tokens(self.tower, pixels).flatten(0, 1)
        return embedded.masked_scatter((ids == image)[..., None], seen)

    def export(self, folder: Path) -> None:
        """Write the model's folder."""
        export_folder(self.model, self.tokenizer, folder)

    def save(self, file: Path) -> None:
        """Write everything a resumed run needs to one file, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "seed": self.schedule.seed,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, temporary := file.with_suffix(".partial"))
        temporary.replace(file)

    def load(self, file: Path) -> None:
        """Resume from :meth:`save`. Raises ValueError if the checkpoint has another seed."""
        state: dict[str, Any] = torch.load(file, weights_only=True)
        if state["seed"] != self.schedule.seed:
            raise ValueError(f"{file} was trained with seed {state['seed']}, not {self.schedule.seed}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def visible(branch: Tensor) -> Tensor:
    """Attention mask: (rows, tokens) branch numbers, -1 on padding -> (rows, 1, tokens, tokens).

    Padding attends to itself, as a row without any visible token would give NaN.
    """
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool).tril()
    same = branch[:, :, None] == branch[:, None, :]
    beginning = (branch == 0)[:, None, :] & (branch >= 0)[:, :, None]
    return ((same | beginning) & causal)[:, None]


def encode(lesson: QuizText, tokenizer: PreTrainedTokenizerFast, rng: Random) -> QuizSequence:
    """Tokenize a lesson and render its scene, if it has one."""
    image = f"{VISION_START}{IMAGE * IMAGE_TOKENS}{VISION_END}" if lesson.scene is not None else ""
    texts = [f"{START}user\n{image}{lesson.text}"]
    for branch in lesson.branches:
        texts += [f"{branch.asked}{END}\n{START}assistant\n", f"{branch.answer}{END}"]
    tokenized = tokenizer(texts, return_offsets_mapping=True)
    beginning, *pieces = tokenized.input_ids
    ids, branches, part = list(beginning), [0] * len(beginning), [LESSON] * len(beginning)
    means = [-1] * len(beginning)
    start = text_positions(len(beginning), beginning, tokenizer.convert_tokens_to_ids(IMAGE))
    positions = [start]
    first = int(start.max()) + 1
    for number, branch in enumerate(lesson.branches, 1):
        asked, answer = pieces[2 * number - 2], pieces[2 * number - 1]
        ids += asked + answer
        branches += [number] * (len(asked) + len(answer))
        part += [QUESTION] * len(asked) + [FORM_BASE + FORMS.index(branch.form)] * len(answer)
        first_word = tokenizer(branch.means).input_ids[0] if branch.means else -1
        said = _said_along(branch.statement, tokenized.offset_mapping[2 * number - 1], tokenizer)
        means += [*said, first_word] + [-1] * (len(answer) - 1)
        positions.append(torch.arange(first, first + len(asked) + len(answer)).expand(3, -1))
    pixels = picture(lesson.scene, rng) if lesson.scene is not None else None
    return QuizSequence(ids, branches, part, means, torch.cat(positions, dim=1), pixels)


def _said_along(
    statement: Statement | None, offsets: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """For each token of a question with its characters: yes or no where the token before it is of the statement."""
    said = [-1] * len(offsets)
    if statement is None:
        return said
    yes, no = (tokenizer(option).input_ids[0] for option in OPTIONS)
    for at, (first, last) in enumerate(offsets[:-1]):
        if statement.start <= first < statement.end:
            said[at + 1] = no if min(last, statement.end) > statement.false_from else yes
    return said


def text_positions(length: int, ids: Sequence[int], image: int) -> Tensor:
    """M-RoPE positions (3, length), as Qwen2.5-VL has them, of a prefix with at most one image."""
    places = torch.arange(length).expand(3, -1).clone()
    if image not in ids:
        return places
    at = list(ids).index(image)
    grid = torch.arange(IMAGE_TOKENS)
    places[0, at : at + IMAGE_TOKENS] = at
    places[1, at : at + IMAGE_TOKENS] = at + grid // IMAGE_STEPS
    places[2, at : at + IMAGE_TOKENS] = at + grid % IMAGE_STEPS
    places[:, at + IMAGE_TOKENS :] -= IMAGE_TOKENS - IMAGE_STEPS
    return places


def curriculum_text(curriculum: Curricula, seed: int, count: int = 4000) -> Iterator[str]:
    """Training text of a tokenizer: ``count`` lessons of the last level."""
    rng = Random(f"tokenizer:{seed}")
    for _ in range(count):
        lesson = curriculum.make(rng, curriculum.levels)
        yield f"user\n{lesson.text}"
        for branch in lesson.branches:
            yield f"{branch.asked}\nassistant\n{branch.answer}"
