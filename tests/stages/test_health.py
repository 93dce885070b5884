"""The health gate, on captions that engines really wrote and on ones that only look alike."""

from __future__ import annotations

import re

import pytest

from capipe.manifests.status import Status
from capipe.models.engine import FinishReason, Thought
from capipe.stages.health import HealthConfig, examine, find_loop

GATE = HealthConfig()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", Status.EMPTY),
        ("  \n", Status.EMPTY),
        ("!" * 50, Status.DEGENERATE),
        ("A cat! ! ! ! ! ! ! ! ! ! ! ! ! !", Status.DEGENERATE),
        ("A red car. " + "The car is red and the road is wet. " * 6, Status.DEGENERATE),
        ("very " * 30, Status.DEGENERATE),
        ("aaaaaaaaaaaaaaaaaaaa", Status.DEGENERATE),
        ("I'm sorry, I can't help with that.", Status.REFUSED),
        ("As an AI language model I cannot see images.", Status.REFUSED),
        ("Sure, here is a detailed description: a dog.", Status.DEGENERATE),
    ],
)
def test_faults(text: str, status: Status) -> None:
    verdict = examine(text, "stop", GATE)
    assert verdict.status is status and verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "A small red circle in the top left.",
        'A sign that reads "I\'m sorry, we are closed" hangs on a door.',
        "Row, row, row your boat, says the banner.",
        "A very, very, very tall tower beside a very low house.",
        "Three cats: a red cat, a blue cat and a green cat. " * 2,
        "The price is $1,000,000.00 (!!!) on the poster...",
    ],
)
def test_healthy_captions_pass(text: str) -> None:
    assert examine(text, "stop", GATE).status is Status.OK


def test_a_cut_caption_is_truncated_unless_wanted() -> None:
    assert examine("A dog on", "length", GATE).status is Status.TRUNCATED
    assert examine("A dog on", "length", HealthConfig(keep_truncated=True)).status is Status.OK


@pytest.mark.parametrize(
    ("thought", "finish", "status", "reason"),
    [
        (Thought("A dog, it", False), "length", Status.TRUNCATED, "reasoning did not end; allow more by --max-tokens"),
        (Thought("A dog, it", False), "stop", Status.DEGENERATE, "reasoning did not end"),
        (Thought("A dog.", True), "length", Status.TRUNCATED, "reasoning .* took all tokens .* --max-tokens"),
        (None, "length", Status.TRUNCATED, "reasoning .* took all tokens .* --max-tokens"),
        (Thought("A dog.", True), "stop", Status.EMPTY, "wrote nothing after its thought"),
        (None, "stop", Status.EMPTY, "the model wrote nothing"),
    ],
)
def test_a_thought_is_no_caption(thought: Thought | None, finish: FinishReason, status: Status, reason: str) -> None:
    verdict = examine("", finish, HealthConfig(keep_truncated=True), thought)
    assert verdict.status is status and re.search(reason, verdict.reason or "")
    assert examine("A dog on a lawn.", "stop", GATE, thought).status is Status.OK


def test_loops_are_found_at_any_phrase_length_and_place() -> None:
    for length in (3, 7, 25):
        phrase = " ".join(f"w{i}" for i in range(length))
        assert find_loop(f"before {phrase} {phrase} {phrase} after", 4) is None
        found = find_loop(f"before {phrase} {phrase} {phrase} {phrase} after", 4)
        assert found is not None and sorted(found.split()) == sorted(phrase.split())
