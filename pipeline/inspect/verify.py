"""`capipe verify`: checks of an artifact against its manifest and its stage's schema, and of what is not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from ...errors import CapipeError
from ...manifests import verify as verification
from ...manifests.artifact import Artifact
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ...manifests.verify import VerifyReport
from ...manifests.withdrawal.absent import AbsentReport, prove_absent
from ...manifests.withdrawal.uid_set import UidSet
from ...stages.export.lance import version
from ...stages.export.lance.captions import APPENDED, full_schema
from ...stages.export.lance.schema import FORMAT as LANCE
from ...stages.export.source import committed_listing, ok_rows
from ...stages.filter.index import indexed_samples
from ..specs import ARTIFACTS


def verify(url: str, images: Sequence[str] = ()) -> VerifyReport:
    """:func:`capipe.manifests.verify.verify`, with the columns of all stages of this package.

    Of an index, the tars are read as well, which belong to it though they are elsewhere; of a Lance table its versions.
    """
    report, artifact = verification.verify(url, images, ARTIFACTS), Artifact.open(url)
    if is_index(artifact) and not report.faults:
        for record in artifact.committed().values():
            report.faults += _tars(artifact, record, images)
    if _is_table(artifact) and not report.faults:
        if find_spec("lance") is None:
            report.notes.append(f"{url}: the table's versions were not read; pip install 'capipe[lance]'")
        else:
            report.faults += [f"{url}/{fault}" for fault in _table(artifact)]
    return report


def _is_table(artifact: Artifact) -> bool:
    """True for an export as a Lance table of which a version has been committed."""
    export, finals = artifact.config["semantic"].get("export"), artifact.config["run"].get("finals")
    return isinstance(export, dict) and export.get("format") == LANCE and finals is not None


def _table(artifact: Artifact) -> Iterator[str]:
    """Faults unless the table's latest version is of the committed shards."""
    records = list(artifact.committed().values())
    with artifact.parquet(records[0].shard) as listed, TemporaryDirectory() as place:
        schema = full_schema(listed.schema_arrow, artifact.config["run"].get(APPENDED, ()))
        yield from version.faults(artifact, records, schema, Path(place))


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
