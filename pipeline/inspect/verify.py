"""`capipe verify`: checks of an artifact against its manifest and its stage's schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from ...errors import CapipeError
from ...manifests import verify as verification
from ...manifests.artifact import Artifact
from ...manifests.manifest import ShardRecord
from ...manifests.verify import VerifyReport
from ...stages.export.source import committed_listing, ok_rows
from ...stages.filter.index import indexed_samples, is_index
from ..specs import ARTIFACTS


def verify(url: str, images: Sequence[str] = ()) -> VerifyReport:
    """:func:`capipe.manifests.verify.verify`, with the columns of all stages of this package.

    Of an index, the tars are read as well, which belong to it though they are elsewhere.
    """
    report, artifact = verification.verify(url, images, ARTIFACTS), Artifact.open(url)
    if is_index(artifact) and not report.faults:
        for record in artifact.committed().values():
            report.faults += _tars(artifact, record, images)
    return report


def _tars(index: Artifact, record: ShardRecord, images: Sequence[str]) -> Iterator[str]:
    """Faults unless the tars of an index's shard hold its images, and are those that it was made over."""
    try:
        with committed_listing(index, record) as listed:
            for _ in indexed_samples(index, record, ok_rows(listed), images):
                pass
    except (CapipeError, OSError, KeyError, pa.ArrowException) as error:
        yield str(error)
