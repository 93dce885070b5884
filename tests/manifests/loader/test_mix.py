"""The choice of captions, and where they are."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from capipe.errors import BadInput
from capipe.manifests.loader.mix import CaptionSource, checked_mix, pick, present, texts

MIX = {"org": 0.3, "re": 0.7}


def test_captions_come_by_their_weights() -> None:
    uids = [f"{number:032x}" for number in range(4000)]
    counts = Counter(pick(MIX, ["re", "org"], 0, 0, uid) for uid in uids)
    assert 0.67 < counts["re"] / len(uids) < 0.73


def test_the_remaining_weights_count_where_a_caption_is_missing() -> None:
    mix = {"a": 1.0, "b": 1.0, "c": 2.0}
    counts = Counter(pick(mix, ["a", "c"], 0, 0, str(number)) for number in range(3000))
    assert set(counts) == {"a", "c"} and 0.63 < counts["c"] / 3000 < 0.70
    assert {pick(mix, ["b"], 0, epoch, "u") for epoch in range(9)} == {"b"}


def test_a_choice_depends_on_seed_epoch_and_image_alone() -> None:
    again = [pick(MIX, ["re", "org"], 3, 5, str(number)) for number in range(50)]
    assert again == [pick(MIX, {"org": 1, "re": 1}, 3, 5, str(number)) for number in range(50)]
    for other in ((4, 5), (3, 6)):
        assert again != [pick(MIX, ["re", "org"], *other, str(number)) for number in range(50)]


@pytest.mark.parametrize(
    ("mix", "problem"),
    [
        ({}, "no captions in it"),
        ({"re": 0}, "above zero"),
        ({"re": -1.0, "org": 2.0}, "above zero"),
        ({"re": float("nan")}, "above zero"),
        ({"re": float("inf")}, "above zero"),
        ({"re": True}, "above zero"),
        ({"re": "0.7"}, "above zero"),
        ({"re": 0.5, "dnese": 0.5}, "no captions 'dnese'; known: dense, org, re"),
    ],
)
def test_what_is_no_weight_is_refused(mix: dict[str, float], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        checked_mix(mix, ["re", "org", "dense"])


def test_the_order_of_names_does_not_matter() -> None:
    assert list(checked_mix({"re": 0.7, "org": 0.3}, ["re", "org"])) == ["org", "re"]


def test_texts_of_a_column() -> None:
    column = pa.chunked_array([["a", None], ["", "  ", "b"]])
    assert texts(CaptionSource("s", "x"), column).to_pylist() == ["a", None, None, None, "b"]


def test_texts_of_listed_captions() -> None:
    def caption(name: str, text: str | None, status: str = "ok") -> dict[str, str | None]:
        return {"name": name, "text": text, "status": status}

    rows = [
        [caption("a", "a0"), caption("b", "b0")],
        None,
        [caption("a", "cut", "truncated"), caption("b", "b2")],
        [],
        [caption("b", " "), caption("a", "a4"), caption("a", "again")],
    ]
    column = pa.chunked_array([rows[:2], rows[2:]])
    found = {name: texts(CaptionSource("s", "captions", name), column) for name in ("a", "b", "")}
    assert {name: values.to_pylist() for name, values in found.items()} == {
        "a": ["a0", None, None, None, "a4"],
        "b": ["b0", None, "b2", None, None],
        "": ["a0", None, "b2", None, "a4"],
    }
    assert present(list(found.values())).tolist() == [True, False, True, False, True]
