"""Captions cut into sentences."""

from __future__ import annotations

import pytest

from capipe.models.scorers.sentences import sentence_spans, split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  \n ", []),
        ("A dog", ["A dog"]),
        ("A dog. A cat.", ["A dog.", "A cat."]),
        ("It is 3.5 m tall! Is it? Yes.", ["It is 3.5 m tall!", "Is it?", "Yes."]),
        ("Dr. Who and J. S. Bach met.", ["Dr. Who and J. S. Bach met."]),
        ('A sign says "EXIT." Beside it is a door.', ['A sign says "EXIT."', "Beside it is a door."]),
        ("(A dog.) A cat.", ["(A dog.)", "A cat."]),
        ("- one\n- two\n\nThree.", ["- one", "- two", "Three."]),
        ("この犬は白い。猫は黒い。", ["この犬は白い。", "猫は黒い。"]),
        ("Ends in dots... And goes on.", ["Ends in dots...", "And goes on."]),
        ("a version 2.0.1 of e.g. this one", ["a version 2.0.1 of e.g. this one"]),
    ],
)
def test_sentences_are_cut_where_a_reader_would(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_nothing_but_blanks_is_lost() -> None:
    text = 'One. Two! "Three?" Four…\nFive. 6 dogs. Mr. Seven (eight). nine.'
    assert "".join(split_sentences(text)).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_spans_are_where_the_sentences_stand() -> None:
    text = '  One. "Two!"  \n\n - three\nNo. 4 is (four).  '
    assert [text[start:end] for start, end in sentence_spans(text)] == ["One.", '"Two!"', "- three", "No. 4 is (four)."]
    assert sentence_spans(" \n") == []


def test_a_long_text_is_cut_in_linear_time() -> None:
    assert len(split_sentences("A dog. " * 20_000)) == 20_000
    assert len(split_sentences('"' * 50_000 + " A")) == 1
