"""Copies of photographs, where a library that ships some is installed (scikit-image; scikit-learn adds two)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..copies import COPIES, copies
from .test_marks import marked, tars

NAMES = ("astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field")
NAMES += ("immunohistochemistry", "moon", "page", "retina", "rocket", "text")


def photographs() -> Iterator[Image.Image]:
    """Whole pictures, and the quarters of those that have 256 pixels a side to each."""
    data = pytest.importorskip("skimage.data", reason="scikit-image, which ships photographs, is not installed")
    images = [Image.fromarray(np.asarray(getattr(data, name)())) for name in NAMES]
    other = find_spec("sklearn")
    if other is not None and other.origin is not None:
        images += [Image.open(path) for path in sorted((Path(other.origin).parent / "datasets/images").glob("*.jpg"))]
    for image in (each.convert("RGB") for each in images):
        yield image
        width, height = image.width // 2, image.height // 2
        if min(width, height) >= 256:
            for left, top in ((0, 0), (width, 0), (0, height), (width, height)):
                yield image.crop((left, top, left + width, top + height))


@pytest.mark.slow
def test_copies_of_photographs_are_found_and_no_two_are_taken_for_one(tmp_path: Path) -> None:
    images: dict[str, bytes] = {}
    for number, image in enumerate(photographs()):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=95)
        images |= {f"{number:03}-{kind}".replace(" ", "_"): data for kind, data in copies(out.getvalue()).items()}
    rows = marked(tars(tmp_path / "in", images.items(), 50), tmp_path / "out")
    home = {key.split("-")[0]: rows[key]["group"] for key in rows if key.endswith(COPIES[0])}
    found = Counter(key.split("-")[1] for key, row in rows.items() if row["group"] == home[key.split("-")[0]])
    recall = {kind: count / len(home) for kind, count in found.items()}
    print(f"{len(home)} photographs and quarters; recall {recall}; groups {len({r['group'] for r in rows.values()})}")
    assert len(home) >= 30
    assert len(set(home.values())) == len(home), "two photographs were taken for one"
    assert len(recall) == len(COPIES) and all(share >= 0.95 for share in recall.values())
