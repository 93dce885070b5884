"""`capipe verify`: checks of an artifact against its manifest and its stage's schema, and of what is not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from ...errors import CapipeError
from ...manifests import verify as verification
from ...manifests.artifact import Artifact
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ...manifests.verify import VerifyReport
from ...manifests.withdrawal.absent import AbsentReport, prove_absent
from ...manifests.withdrawal.uid_set import UidSet
from ...stages.export.source import committed_listing, ok_rows
from ...stages.filter.index import indexed_samples
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


def verify_absent(url: str, uids: UidSet) -> tuple[AbsentReport, list[str]]:
    """Search a folder for listed images, with notes on what a folder names and does not hold."""
    report = prove_absent(url, uids)
    if not Artifact.exists(url) or not is_index(index := Artifact.open(url)):
        return report, []
    return report, [f"{url}: an index, whose rows were read; the tars in {index.config['run']['shards']} were not"]
