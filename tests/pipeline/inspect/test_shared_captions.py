"""Captions that many images share: counted once an image, named by the commonest, in bounded memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE
from capipe.pipeline.inspect.shared_captions import SHARED, Texts, count_shared, shared_captions


def pieces(images: Sequence[Sequence[str]], size: int = 100) -> Iterator[Texts]:
    """Captions by image, as read from a file: ``size`` images at a time."""
    for start in range(0, len(images), size):
        read = [(row, text) for row, texts in enumerate(images[start : start + size]) for text in texts]
        yield pa.array([row for row, _ in read], pa.int32()), pa.array([text for _, text in read], pa.string())


def test_a_caption_counts_once_an_image_and_only_above_the_bound() -> None:
    others = [[f"A picture of number {number}."] for number in range(50)]
    assert count_shared(pieces([*others, *[["A dog.", "A black dog."]] * SHARED])) is None
    found = count_shared(
        pieces([*others, *[["A dog.", "A dog."]] * (SHARED + 5), [], *[["A cat.", "No cat."]] * (SHARED + 1)])
    )
    assert found is not None
    assert (found.texts, found.images, found.seen) == (3, 3 * SHARED + 7, 50 + 2 * SHARED + 6)
    assert (found.commonest, found.times) == ("A dog.", SHARED + 5)
    assert str(found).endswith("the commonest under 25 of 96: 'A dog.'")


def test_one_long_caption_is_named_in_one_short_line() -> None:
    text = "A photograph.\n\n" + "It shows a great many things. " * 50
    found = count_shared(pieces([[text]] * 4000))
    assert found is not None
    line = str(found)
    assert line.startswith("one caption stands under 4000 of 4000 images: 'A photograph. It shows")
    assert "\n" not in line and len(line) < 130


def test_forgotten_texts_make_no_count_too_high_and_hide_no_common_one() -> None:
    """Blocks of a hundred captions: the bound of the module's docstring holds."""
    images = [["Always the same."] if number % 10 == 0 else [f"Other {number}."] for number in range(20_000)]
    found = count_shared(pieces(images), block=1, most=100)
    assert found is not None
    assert (found.texts, found.commonest, found.times) == (1, "Always the same.", 2000)
    assert count_shared(pieces([[f"Other {number}."] for number in range(5000)] * 2), block=1, most=100) is None


def test_counts_are_those_of_a_plain_counter_or_too_low_by_one_a_block() -> None:
    """The slow twin counts every text in Python."""
    chosen = random.Random(3)
    images = [chosen.choices([f"text {n}" for n in range(400)], range(400, 0, -1), k=2) for _ in range(20_000)]
    exact = Counter(text for texts in images for text in set(texts))
    expected = {text: count for text, count in exact.items() if count > SHARED}
    whole = count_shared(pieces(images))
    assert whole is not None and (whole.texts, whole.images) == (len(expected), sum(expected.values()))
    assert whole.times == max(exact.values()) == exact[whole.commonest]
    blocks = 20_000 // 100
    lossy = count_shared(pieces(images), block=1)
    assert lossy is not None and exact[lossy.commonest] - blocks <= lossy.times <= exact[lossy.commonest]


def test_only_healthy_captions_of_the_files_are_counted(tmp_path: Path) -> None:
    artifact = Artifact.create(str(tmp_path / "captions"), "annotate", {}, {"shards_total": 1})
    with artifact.begin("00000", ANNOTATE) as out:
        for number in range(60):
            said = [{"name": "a", "text": "Same.", "status": "ok" if number % 2 else "refused"}]
            said += [{"name": "b", "text": "Same.", "status": "ok"}] * (number < 10) + [{"name": "c", "status": "ok"}]
            out.write({"key": str(number), "uid": None, "status": "ok", "error": None, "captions": said})
        out.commit(rows_in=60, input_info={"digest": "0"})
    artifact.close()
    found = shared_captions(artifact, ["00000"])
    assert found is not None and (found.seen, found.times, found.commonest) == (35, 35, "Same.")
