"""`capipe verify`: checks of an artifact against its manifest and its stage's schema."""

from __future__ import annotations

from collections.abc import Sequence

from ...manifests import verify as verification
from ...manifests.verify import VerifyReport
from ..specs import ARTIFACTS


def verify(url: str, images: Sequence[str] = ()) -> VerifyReport:
    """:func:`capipe.manifests.verify.verify`, with the columns of all stages of this package."""
    return verification.verify(url, images, ARTIFACTS)
