"""Beam search over a batch: the likeliest texts of several prompts at once, as transformers' ``generate`` finds them.

With ``do_sample=False, length_penalty=1, early_stopping=False``: the score of a text is the mean log-probability of its
tokens, the end included, and a prompt is done when its best running beam, at its present length, would not enter its
best finished ones. Every prompt has the same number of beams; :func:`~.batched_lm.BatchedLM.generate_reference` is the
slow twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Node(NamedTuple):
    """The newest token of a beam, and the beam that it continues; ``logprob`` of the token under the model alone."""

    token: int
    logprob: float
    before: Node | None  # None for a first token

    def path(self) -> list[Node]:
        """All tokens, first to last."""
        nodes, node = list[Node](), self
        while True:
            nodes.append(node)
            if node.before is None:
                return nodes[::-1]
            node = node.before


@dataclass(frozen=True)
class Finished:
    """A finished text. ``score``: mean log-probability; ``stopped``: by an end, not by the limit."""

    score: float
    last: Node
    stopped: bool


@dataclass
class Beams:
    """A prompt's search. ``running``: likeliest first, with ``scores``; ``finished``: the best ones, best first."""

    limit: int
    running: list[Node | None] = field(default_factory=lambda: [None])
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[Finished] = field(default_factory=list)


class Candidate(NamedTuple):
    """A continuation: of the prompt's beam ``beam`` by ``token``; ``score``: sum of log-probabilities."""

    score: float
    beam: int
    token: int
    logprob: float


@dataclass(frozen=True)
class Step:
    """What the model reads next. ``rows``: (rows,), the row of the logits that each continues; ``tokens``: (rows,).

    ``done``: indices, among the prompts that were searched, of those that end here.
    """

    rows: Tensor
    tokens: Tensor
    done: list[int]


class BeamSearch:
    """The state of a batch's searches. ``limits``: most tokens for each prompt; ``ends``: ids that end a text."""

    def __init__(self, limits: Sequence[int], width: int, ends: frozenset[int]) -> None:
        self._width, self._ends = width, ends
        self.beams = [Beams(limit) for limit in limits]
        self._alive = list(range(len(limits)))
        self.position = 0  # tokens of each running beam

    def advance(self, processed: Tensor, logits: Tensor) -> Step:
        """Continue all running searches by one token, and report which are done.

        ``processed``: (rows, vocab), log-probabilities after all rules, a row for each running beam, prompt by prompt;
        ``logits``: (rows, vocab), of the model, for the log-probabilities to report.
        """
        vocab, alive = processed.shape[1], list(self._alive)
        widths = len(self.beams[alive[0]].running)
        scores = torch.tensor([self.beams[at].scores for at in alive], dtype=processed.dtype, device=processed.device)
        totals = (processed.unflatten(0, (len(alive), widths)) + scores[..., None]).flatten(1)
        # Enough that as many as the width go on, whatever the number of those that end.
        kept = totals.topk(min(max(2, 1 + len(self._ends)) * self._width, totals.shape[1]))
        rows = kept.indices // vocab + torch.arange(len(alive), device=totals.device)[:, None] * widths
        tokens = kept.indices % vocab
        reported = (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).tolist()
        candidates = zip(kept.values.tolist(), (kept.indices // vocab).tolist(), tokens.tolist(), reported, strict=True)
        next_rows, next_tokens, done = list[int](), list[int](), list[int]()
        for place, (at, columns) in enumerate(zip(alive, candidates, strict=True)):
            chosen = self._continued(self.beams[at], [Candidate(*values) for values in zip(*columns, strict=True)])
            if not chosen:
                done.append(at)
                continue
            next_rows += [place * widths + candidate.beam for candidate in chosen]
            next_tokens += [candidate.token for candidate in chosen]
        self._alive = [at for at in alive if at not in done]
        self.position += 1
        device = processed.device
        return Step(torch.tensor(next_rows, device=device), torch.tensor(next_tokens, device=device), done)

    def _continued(self, beams: Beams, candidates: list[Candidate]) -> list[Candidate]:
        """Update a prompt's search with its candidates, likeliest first. Returns those that go on; none if it is done.

        Of those that end only the likeliest, as many as the width, count as finished.
        """
        length, running = self.position + 1, list[Candidate]()
        for rank, candidate in enumerate(candidates):
            stopped = candidate.token in self._ends
            if not stopped and length < beams.limit:
                running.append(candidate)
            elif rank < self._width:
                node = Node(candidate.token, candidate.logprob, beams.running[candidate.beam])
                beams.finished.append(Finished(candidate.score / length, node, stopped))
        beams.finished = sorted(beams.finished, key=lambda text: -text.score)[: self._width]
        running = running[: self._width]
        full = len(beams.finished) == self._width
        if not running or (full and running[0].score / length <= beams.finished[-1].score):
            return []
        nodes = [Node(candidate.token, candidate.logprob, beams.running[candidate.beam]) for candidate in running]
        beams.running, beams.scores = list(nodes), [candidate.score for candidate in running]
        return running
