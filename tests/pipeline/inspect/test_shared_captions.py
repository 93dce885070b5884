"""Captions that many images share: counted once an image, named by the commonest, in bounded memory."""

from __future__ import annotations

from capipe.pipeline.inspect.shared_captions import SHARED, count_shared


def test_a_caption_counts_once_an_image_and_only_above_the_bound() -> None:
    others = [{f"A picture of number {number}."} for number in range(50)]
    assert count_shared([*others, *[{"A dog.", "A black dog."}] * SHARED]) is None
    found = count_shared([*others, *[{"A dog."}] * (SHARED + 5), set(), *[{"A cat.", "No cat."}] * (SHARED + 1)])
    assert found is not None
    assert (found.texts, found.images, found.seen) == (3, 3 * SHARED + 7, 50 + 2 * SHARED + 6)
    assert (found.commonest, found.times) == ("A dog.", SHARED + 5)
    assert str(found).endswith("the commonest under 25 of 96: 'A dog.'")


def test_one_long_caption_is_named_in_one_short_line() -> None:
    text = "A photograph.\n\n" + "It shows a great many things. " * 50
    found = count_shared([{text}] * 4000)
    assert found is not None
    line = str(found)
    assert line.startswith("one caption stands under 4000 of 4000 images: 'A photograph. It shows")
    assert "\n" not in line and len(line) < 130


def test_forgotten_texts_make_no_count_too_high_and_hide_no_common_one() -> None:
    images = [{"Always the same."} if number % 10 == 0 else {f"Other {number}."} for number in range(20_000)]
    found = count_shared(images, digests=100)
    assert found is not None
    assert (found.texts, found.commonest, found.times) == (1, "Always the same.", 2000)
    assert count_shared([{f"Other {number}."} for number in range(5000)] * 2, digests=100) is None
