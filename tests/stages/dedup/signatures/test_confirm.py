"""The judgement of pairs, against its slow twin."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from capipe.stages.dedup.perceptual_hash import SIGNATURE_BYTES, Signatures, looks
from capipe.stages.dedup.signatures import confirm, slow_confirm
from capipe.stages.dedup.signatures.registration import fitted, warped
from capipe.stages.dedup.signatures.slow_registration import fitted as slowly_fitted
from capipe.stages.dedup.signatures.slow_registration import warped as slowly_warped

from ...copies import copies, originals


def signature(image: Image.Image) -> bytes:
    return looks(image.convert("RGB")).signature


def every_kind(scenes: int) -> Signatures:
    """Originals, their copies and near scenes, crops of growing size."""
    parts = []
    for original, near in originals(scenes_=scenes, photos=scenes // 2, size=128, seed=4):
        parts += [original, *copies(original).values(), *near.values()]
    images = [Image.open(io.BytesIO(data)) for data in parts]
    for image in images[:: max(1, len(images) // 12)]:
        images += [image.crop((n, n // 2, image.width - n, image.height)) for n in (2, 5, 8)]
    return np.stack([np.frombuffer(signature(image), dtype=np.uint8) for image in images])


@pytest.fixture(scope="module")
def signatures() -> Signatures:
    return every_kind(3)


def test_the_same_judgement_as_the_slow_twin(signatures: Signatures) -> None:
    rng = np.random.default_rng(0)
    near = np.arange(len(signatures) - 1)
    i = np.concatenate([near, rng.integers(0, len(signatures), 120)])
    j = np.concatenate([near + 1, rng.integers(0, len(signatures), 120)])
    wanted = slow_confirm.same_picture(signatures[i], signatures[j])
    assert (confirm.same_picture(signatures[i], signatures[j]) == wanted).all()
    assert (confirm.same_picture(signatures[j], signatures[i]) == wanted).all()
    assert 20 < wanted.sum() < len(wanted) - 50


def test_what_is_near_a_bound_is_judged_by_the_slow_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat images as far apart as a copy may be: rounding decides, and the twin's does."""
    grey = np.full((2, SIGNATURE_BYTES), 128, dtype=np.uint8)
    grey[1, :4096] += 10
    asked = []

    def slowly(a: Signatures, b: Signatures) -> np.ndarray:
        asked.append(len(a))
        return slow_confirm.same_picture(a, b)

    monkeypatch.setattr(confirm, "judged_slowly", slowly)
    for level in (0, 60, 120):
        a, b = np.minimum(grey[:1] + np.uint8(level), 255), np.minimum(grey[1:] + np.uint8(level), 255)
        assert (confirm.same_picture(a, b) == slow_confirm.same_picture(a, b)).all()
    monkeypatch.setattr(confirm, "_UNCLEAR", np.float32(1e9))
    assert confirm.same_picture(grey[:1], grey[1:]) == slow_confirm.same_picture(grey[:1], grey[1:]) and asked


def test_flat_black_white_and_noise() -> None:
    rng = np.random.default_rng(1)
    levels = np.array([0, 1, 11, 127, 234, 255], dtype=np.uint8)
    flat = np.full((len(levels), SIGNATURE_BYTES), 128, dtype=np.uint8)
    flat[:, :4096] = levels[:, None]
    noise = rng.integers(0, 256, (2, SIGNATURE_BYTES), dtype=np.uint8)
    every = np.concatenate([flat, noise, noise // 2, 255 - noise])
    i, j = (part.ravel() for part in np.indices((len(every), len(every))))
    assert (confirm.same_picture(every[i], every[j]) == slow_confirm.same_picture(every[i], every[j])).all()
    assert confirm.same_picture(every, every).all()


def test_no_pairs() -> None:
    none = np.empty((0, SIGNATURE_BYTES), dtype=np.uint8)
    assert len(confirm.same_picture(none, none)) == 0


def test_fits_and_warps_are_those_of_the_slow_twin(signatures: Signatures) -> None:
    luma = signatures[:, :4096].reshape(-1, 64, 64).astype(np.float32)
    rgb = np.repeat(luma[:, None], 3, axis=1)
    a, b = luma[:40], luma[1:41]
    fit, clear, _ = fitted(a, b)
    slow = slowly_fitted(a, b)
    apart = np.abs(fit - slow).max(axis=1)
    assert (apart[clear > 1e-2] < 1e-3).mean() > 0.9
    planes, inside = warped(rgb[1:41], slow, 2)
    slow_planes, slow_inside = slowly_warped(rgb[1:41], slow, 2)
    assert np.abs(planes - slow_planes).max() < 0.05 and (inside.astype(bool) == slow_inside).mean() > 0.999
