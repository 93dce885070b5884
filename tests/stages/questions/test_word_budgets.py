"""Captions cut at a number of words."""

from __future__ import annotations

import pytest

from capipe.stages.questions.word_budgets import budget_of, budgeted, cut


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        ("A red star, and a circle.", 3, "A red star,"),
        ("A red\n\n star.  ", 2, "A red"),
        ("A red\n\n star.  ", 3, "A red\n\n star.  "),
        ("A red star.", 400, "A red star."),
        ("", 1, ""),
        ("红色的星星在白色背景上", 2, "红色的星"),
        ("红色，的星星", 2, "红色，的星"),
        ("a " + "x" * 100 + " b", 2, "a " + "x" * 100),
    ],
)
def test_cut(text: str, words: int, kept: str) -> None:
    assert cut(text, words) == kept


def test_a_cut_text_is_a_beginning_and_grows_with_the_budget() -> None:
    text = "One two, three.\n- four five | six | 七八九十 eleven"
    kept = [cut(text, words) for words in range(1, 15)]
    assert all(text.startswith(each) for each in kept) and kept[-1] == text
    assert [len(each) for each in kept] == sorted(len(each) for each in kept) and len(set(kept)) > 6
    with pytest.raises(ValueError, match="at least 1"):
        cut(text, 0)


def test_names() -> None:
    assert [budgeted(name, 50) for name in ("dense", "dense#3")] == ["dense@50", "dense@50#3"]
    assert budget_of("dense@50") == budget_of("dense@50#3") == ("dense", 50)
    assert [budget_of(name) for name in ("dense", "dense@", "dense@0", "dense@x", "self-oracle")] == [None] * 5
