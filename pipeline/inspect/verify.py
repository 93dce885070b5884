"""`capipe verify`: an artifact checked against its promises and what is known of its stage."""

from __future__ import annotations

from collections.abc import Sequence

from ...manifests import verify as verification
from ...manifests.verify import VerifyReport
from ..specs import ARTIFACTS


def verify(url: str, images: Sequence[str] = ()) -> VerifyReport:
    """:func:`capipe.manifests.verify.verify`, with the columns of all stages of this package."""
    return verification.verify(url, images, ARTIFACTS)
