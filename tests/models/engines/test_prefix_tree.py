"""Plans lose no token and no order, and never cost more than computing every prompt by itself."""

from __future__ import annotations

from random import Random

import pytest

from capipe.models.engines.hf.prefix_tree import Level, Segment, cost, plan, unshared

Prompts = list[list[int]]


def tree(rng: Random, branches: tuple[int, ...], widths: tuple[int, int]) -> Prompts:
    """Prompts that share as a tree does: ``branches[0]`` beginnings, each going on in ``branches[1]`` ways."""
    prompts: Prompts = [[]]
    for ways in branches:
        prompts = [each + [rng.randrange(-3, 99) for _ in range(rng.randint(*widths))] for each in prompts * ways]
        prompts.sort()
    rng.shuffle(prompts)
    return prompts


def read_back(levels: list[Level], prompts: Prompts) -> Prompts:
    """What each row of the last level has computed before it and in it, following parents level by level."""
    rows: list[list[int]] = []
    for depth, level in enumerate(levels):
        before, rows = rows, []
        for each in level:
            assert each.start < each.end
            assert (each.parent is None) == (each.start == 0)
            taken = [] if each.parent is None else before[each.parent]
            assert depth or each.parent is None
            assert len(taken) == each.start
            rows.append(taken + prompts[each.of][each.start : each.end])
    return rows


def quiz(captions: int, questions: int, orders: int, caption: int) -> Prompts:
    """The reader's prompts: instructions, a caption, a question, an order of its options, the template's end."""
    rng = Random(captions)
    tokens = iter(range(1000, 10**6))
    prompts = []
    for _ in range(captions):
        beginning = [*range(40), *(next(tokens) for _ in range(caption + rng.randrange(20)))]
        for _ in range(questions):
            question = [next(tokens) for _ in range(20)]
            for _ in range(orders):
                prompts.append([*beginning, *question, *(next(tokens) for _ in range(20)), 7, 8, 9])
    return prompts


@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_computed_once_in_its_place(seed: int) -> None:
    rng = Random(seed)
    branches = rng.choice([(1, 8, 4), (2, 3, 5), (12,), (1, 2, 2, 2, 2), (3, 1, 7), (5, 5)])
    prompts = tree(rng, branches, rng.choice([(1, 3), (5, 60), (30, 31), (1, 300)]))
    prompts += [list(each[: rng.randint(1, len(each))]) for each in prompts[:3]]  # some are beginnings of others
    prompts += prompts[:2]  # the same ids can come from different chats
    levels = plan(prompts)
    assert read_back(levels, prompts) == prompts
    assert [each.of for each in levels[-1]] == list(range(len(prompts)))
    assert cost(levels) <= cost(unshared([len(each) for each in prompts]))


def test_a_quiz_shares_captions_and_questions() -> None:
    prompts = quiz(1, 8, 4, caption=200)
    levels = plan(prompts)
    assert [len(level) for level in levels] == [1, 8, 32]
    assert {each.end for each in levels[0]} >= {min(each.start for each in levels[1])}
    assert max(each.end - each.start for each in levels[-1]) == 23
    assert cost(levels) < cost(unshared([len(each) for each in prompts])) / 4


def test_two_captions_do_not_share_with_each_other() -> None:
    prompts = quiz(2, 8, 4, caption=200)
    levels = plan(prompts)
    assert read_back(levels, prompts) == prompts
    owners = {each.of // 32 for each in levels[-2]}
    assert owners == {0, 1}
    assert cost(levels) < cost(unshared([len(each) for each in prompts])) / 4


def test_what_shares_little_is_left_alone() -> None:
    apart = [[index, *range(1000, 1030)] for index in range(8)]
    assert plan(apart) == unshared([31] * 8)
    alike = [[*range(5), *range(100 * index, 100 * index + 9)] for index in range(2)]
    assert plan(alike) == unshared([14] * 2)  # five tokens are not worth a pass of their own
    assert plan([[1, 2, 3]]) == [[Segment(0, 0, 3, None)]]
    assert plan([[1]] * 3) == unshared([1] * 3)


def test_a_stranger_in_the_batch_keeps_others_sharing() -> None:
    prompts = [*quiz(1, 8, 4, caption=300), [5] * 30, [6] * 700]
    levels = plan(prompts)
    assert read_back(levels, prompts) == prompts
    assert cost(levels) < cost(unshared([len(each) for each in prompts])) / 4
