"""Penalties of single tokens stand where what they punish ends; their sum is the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from capipe.models.bundled import folder_of
from capipe.models.engines.base import Completion, Thought
from capipe.models.engines.prompting import PromptEncoder
from capipe.trainer.advantages import RewardTerm
from capipe.trainer.dataset import Example
from capipe.trainer.policy.batch import Group
from capipe.trainer.policy.critic import token_rewards
from capipe.trainer.rewards.base import RewardManager, Scored
from capipe.trainer.rewards.token_penalties import (
    PhrasesConfig,
    PhrasesReward,
    RepeatsConfig,
    RepeatsReward,
    find_all,
    phrase_pattern,
    tokens_at,
)

TASK = Example("u" * 32, "k", "memory://x.tar", 0, 1, ())


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    from transformers import AutoTokenizer

    return PromptEncoder(AutoTokenizer.from_pretrained(folder_of("captioner")), None)


def written(encoder: PromptEncoder, text: str, end: int | None = None) -> Completion:
    ids = encoder.text_ids(text) + ([] if end is None else [end])
    return Completion(text, tuple(ids), "stop", len(ids))


def pieces(encoder: PromptEncoder, caption: Completion, scored: Scored) -> list[str]:
    """What the text is up to each token that is charged."""
    assert len(scored.per_token) == caption.n_tokens and sum(scored.per_token) == scored.value
    ids = list(caption.token_ids)
    return [encoder.decode(ids[: place + 1]) for place, value in enumerate(scored.per_token) if value]


async def phrases(encoder: PromptEncoder, text: str, **settings: Any) -> tuple[Completion, Scored]:
    caption = written(encoder, text)
    return caption, await PhrasesReward(PhrasesConfig(**settings), encoder.decode).score(TASK, caption, "d")


async def test_a_phrase_is_charged_to_the_token_that_ends_it(encoder: PromptEncoder) -> None:
    caption, scored = await phrases(encoder, "This is a Photo  of a star, an image of 1987.")
    assert scored.value == -3
    assert scored.details["phrases"] == {"a photo of": 1, "an image of": 1, PhrasesConfig().patterns[0]: 1}
    charged = pieces(encoder, caption, scored)
    ends = ("a Photo  of", "an image of", "1987")
    for end, piece, before in zip(ends, charged, ["", *charged], strict=False):
        start = caption.text.index(end) + len(end)
        assert caption.text[:start] in piece and len(before) < start  # no later, and no sooner, than the token allows


async def test_words_that_only_begin_like_a_phrase_cost_nothing(encoder: PromptEncoder) -> None:
    for text in ("a photo offering a star", "banana picture of it", "In 198 or 19870 ways", ""):
        caption, scored = await phrases(encoder, text)
        assert scored.value == 0 and scored.per_token == (0.0,) * caption.n_tokens and not scored.details


def test_a_place_between_the_bytes_of_a_character_is_its_last_token() -> None:
    """A tokenizer of single bytes: half of a character is another text."""
    text = "día 猫x"
    ids = list(text.encode())

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    caption = Completion(text, tuple(ids), "stop", len(ids))
    ends = range(1, len(text) + 1)
    assert tokens_at(caption, ends, decode) == [len(text[:end].encode()) - 1 for end in ends]
    assert tokens_at(Completion("ab", (97, 98), "stop", 2), [2, 9], decode) == [1, 1]  # a place past the end: the last
    before = "<think>día</think>\n\n".encode()
    after = Completion(text, (*before, *ids), "stop", len(before) + len(ids), thought=Thought("día", True))
    assert tokens_at(after, ends, decode) == [len(before) + len(text[:end].encode()) - 1 for end in ends]


async def test_repeats_are_counted_in_tokens_or_in_words() -> None:
    def decode(ids: list[int]) -> str:
        return " ".join(NAMES[each] for each in ids)

    NAMES = ["a", "red", "star", "A", "Red", "circle", "."]  # noqa: N806
    ids = (0, 1, 2, 6, 3, 4, 5, 0, 1, 2)  # a red star . A Red circle a red star
    caption = Completion(decode(list(ids)), ids, "stop", len(ids))

    async def charged(**settings: Any) -> list[int]:
        scored = await RepeatsReward(RepeatsConfig(**settings), decode).score(TASK, caption, "d")
        assert scored.value == sum(scored.per_token) and len(scored.per_token) == len(ids)
        return [place for place, value in enumerate(scored.per_token) if value]

    assert await charged() == [8, 9]  # "a red", "red star"
    assert await charged(n=3) == [9]
    assert await charged(of="words") == [5, 8, 9]  # "A Red", too
    assert await charged(n=1) == [7, 8, 9]
    assert await charged(n=20) == []


async def test_they_enter_the_returns_where_they_occur(encoder: PromptEncoder) -> None:
    captions = [written(encoder, "an image of a star and an image of a star"), written(encoder, "a star")]
    rewards = {
        "phrases": PhrasesReward(PhrasesConfig(), encoder.decode),
        "repeats": RepeatsReward(RepeatsConfig(n=3), encoder.decode),
    }
    judge = RewardManager(rewards, {"phrases": RewardTerm(0.5), "repeats": RewardTerm(0.25)})
    results = judge.results([await judge.score(TASK, each, "d") for each in captions])
    assert (
        results[0].score == pytest.approx(-1.0 + 0.25 * (results[0].components["repeats"] or 0))
        and results[1].score == 0
    )
    scores = torch.tensor([result.score or 0.0 for result in results])
    group = Group("u", "k", None, captions, results)  # type: ignore[arg-type]
    earned, _ = token_rewards(group, scores)
    first = captions[0].n_tokens
    assert earned[:first].tolist() == pytest.approx(results[0].per_token)
    assert earned[first:].abs().max() == 0  # nothing left for the last token
    assert sum(results[0].per_token) == pytest.approx(results[0].score)


def test_phrases_are_found_as_often_as_they_occur() -> None:
    patterns = {phrase: phrase_pattern(phrase) for phrase in ("sure,", "a star")}
    assert find_all(patterns, "Sure, a star. sure,a\nstar") == [
        ("sure,", 5),
        ("sure,", 19),
        ("a star", 12),
        ("a star", 25),
    ]


async def test_without_token_ids_the_caption_as_a_whole_pays() -> None:
    def decode(ids: Sequence[int]) -> str:
        raise AssertionError("there is nothing to decode")

    caption = Completion("a photo of a star", (), "stop", 5)
    scored = await PhrasesReward(PhrasesConfig(), decode).score(TASK, caption, "d")
    assert (scored.value, scored.per_token) == (-1, ())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"phrases": (), "patterns": ()}, "both empty: nothing would be looked for"),
        ({"patterns": ("(19",)}, "is no regular expression"),
        ({"patterns": ("x*",)}, "found in an empty text"),
        ({"phrases": ("  ",)}, "a phrase is empty"),
        ({"normalise": True}, "normalise"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PhrasesConfig(**settings)
