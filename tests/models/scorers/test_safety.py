"""The optional safety detector on pictures that are safe; what it finds in others is its makers' to show."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from capipe.errors import BadInput
from capipe.models.images.preprocess import preprocessed
from capipe.models.scorers.safety import UNSAFE, NudeNetDetector


def test_photographs_and_drawings_are_safe() -> None:
    pytest.importorskip("nudenet")
    data = pytest.importorskip("skimage.data")
    detector = NudeNetDetector()
    shown = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee")]
    found = detector.detect([np.asarray(preprocessed(image, detector.preprocess)) for image in shown])
    assert found == [{}, {}]


def test_only_unsafe_classes_count_and_each_with_its_highest_score(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nudenet")
    detector = NudeNetDetector()
    seen = [
        {"class": "FACE_FEMALE", "score": 0.9, "box": []},
        {"class": UNSAFE[0], "score": 0.4, "box": []},
        {"class": UNSAFE[0], "score": 0.7, "box": []},
    ]
    monkeypatch.setattr(detector._detector, "detect", lambda image: seen)
    assert detector.detect([np.zeros((320, 320, 3), dtype=np.uint8)]) == [{UNSAFE[0]: 0.7}]


def test_without_its_package_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(BadInput, match=r"capipe\[safety\]"):
        NudeNetDetector()
