"""Files over all shards of an export: indexes, sizes, the list of conversations, the card.

They are written from the committed shards alone, so their bytes do not depend on earlier runs; and not again while
everything that goes into them is the same.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...manifests.file_transaction import FileTransaction
from ...manifests.files.storage import PRIVATE, read_parquet
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ...manifests.withdrawal.applied import encodes_anew
from ...stages import last_files
from ...stages.export import energon
from ...stages.export.card import CardWords, Contents, render, summary
from ...stages.export.card_statistics import Statistics
from ...stages.export.croissant import CROISSANT, Described, croissant
from ...stages.export.formats import writer_class
from ...stages.export.lance import version
from ...stages.export.lance.captions import APPENDED, full_schema
from ...stages.export.lance.schema import FORMAT as LANCE
from ...stages.export.lance.schema import described, features
from ...stages.export.llava import DATASET_INFO, dataset_info
from ...stages.export.parquet import training_schema
from ...stages.export.provenance import Step, chain
from ...stages.export.source import PARTS
from ...stages.export.webdataset import SIZES
from ...stages.export.write import TAR_BYTES
from ...stages.export.writer import LooseWriter, ShardWriter, part_file

CARD = "README.md"


def extras(writer: type[ShardWriter]) -> list[str]:
    """Files of an export that belong to no shard; `--fresh` removes them, too."""
    return [CARD, CROISSANT, *writer.extras]


def write_files(artifact: Artifact, source: Artifact, words: CardWords, format: str, notes: Sequence[str]) -> None:
    """Write the files over all shards, unless they are there; each appears as a whole, the one that completes an index
    last."""
    records, steps = list(artifact.committed().values()), chain(source)
    sets = list(artifact.config["run"].get(APPENDED, ()))
    facts = [format, asdict(words), list(notes), [asdict(step) for step in steps], _source_size(source, records), sets]
    digest = last_files.digest_of(artifact, facts)
    if last_files.are_there(artifact, digest) and (format != LANCE or _has_version(artifact)):
        return
    with artifact.begin_files("extras") as files:
        statistics, rows = _statistics(artifact, records)
        contents = replace(_contents(source, format, records, notes, sets, rows), encoded_anew=encodes_anew(artifact))
        _write(files, CARD, render(words, contents, statistics, steps).encode())
        if format == "webdataset":
            _write_webdataset(artifact, records, files)
        if format == "messages":
            _write(files, DATASET_INFO, dataset_info())
        writer = writer_class(format)
        if issubclass(writer, LooseWriter):
            with files.writing(writer.listed) as file:
                for piece in writer.joined(_parts(artifact, records)):
                    file.write(piece)
        text = summary(contents, statistics, steps)
        _write_croissant(files, records, words, contents, rows, text, steps)
        more, old = _commit_table(artifact, files, records, words, steps, sets, rows) if format == LANCE else ({}, [])
        published = files.publish()
        for name in old:
            artifact.folder.remove_file(name)
        finals = {name: file for name, file in published.items() if not version.is_version_file(name)}
        last_files.note(artifact, digest, finals, **more)


def _write(files: FileTransaction, name: str, data: bytes) -> None:
    with files.writing(name) as file:
        file.write(data)


def _statistics(artifact: Artifact, records: Sequence[ShardRecord]) -> tuple[Statistics, pa.Schema]:
    """Statistics of all listings, and the columns of the first one."""
    statistics, rows = Statistics(), None
    for record in records:
        with artifact.parquet(record.shard) as parquet:
            statistics.add(parquet)
            rows = rows or parquet.schema_arrow
    return statistics, rows


def _contents(
    source: Artifact,
    format: str,
    records: Sequence[ShardRecord],
    notes: Sequence[str],
    sets: Sequence[Mapping[str, Any]],
    rows: pa.Schema,
) -> Contents:
    """What the card is about."""
    size = _source_size(source, records)
    shards = sum(bool(record.stats["samples"]) for record in records)
    columns = features(full_schema(rows, sets)) if format == LANCE else ()
    return Contents(format, shards, size, _images(records), notes, columns, sets)


def _has_version(artifact: Artifact) -> bool:
    """True if the latest version of a Lance table is the one that was noted."""
    number = artifact.config["run"].get(version.NOTE)
    return isinstance(number, int) and version.is_latest(artifact.folder, number)


def _commit_table(
    artifact: Artifact,
    files: FileTransaction,
    records: Sequence[ShardRecord],
    words: CardWords,
    steps: Sequence[Step],
    sets: Sequence[dict[str, Any]],
    rows: pa.Schema,
) -> tuple[dict[str, Any], list[str]]:
    """Add the version of a Lance table that the committed shards make to the files to publish, unless it is there.

    Returns what is to be noted, and version files to remove once it is published. Raises ArtifactMismatch if a shard
    has other columns than the others.
    """
    made_by = [{"stage": step.stage, "name": step.name, "fingerprint": step.fingerprint} for step in steps]
    about = {**asdict(words), "fingerprint": artifact.fingerprint, "provenance": made_by}
    schema = described(full_schema(rows, sets), about, sets)
    fragments = version.planned(artifact, records, schema)
    number, old = version.commit_version(files, artifact.folder, schema, fragments, artifact.fingerprint)
    return {version.NOTE: number}, old


def _write_croissant(
    files: FileTransaction,
    records: Sequence[ShardRecord],
    words: CardWords,
    contents: Contents,
    rows: pa.Schema,
    text: str,
    steps: Sequence[Step],
) -> None:
    """Write the Croissant metadata of all published files but this one."""
    listed = {name: file for record in records for name, file in record.files.items()} | dict(files.written)
    public = {name: file for name, file in listed.items() if not name.startswith(f"{PRIVATE}/")}
    data = training_schema(rows) if contents.format == "parquet" else None
    what = Described(contents.format, text, public, rows, data, list(contents.images))
    _write(files, CROISSANT, croissant(words, what, steps))


def _source_size(source: Artifact, records: Sequence[ShardRecord]) -> int:
    """Bytes of the source's tars, or of what an index's pairs would be as tars."""
    if is_index(source):
        return sum(int(record.stats[TAR_BYTES]) for record in records)
    return sum(int(record.files[f"{record.shard}.tar"]["bytes"]) for record in source.committed().values())


def _images(records: Sequence[ShardRecord]) -> Counter[str]:
    """Number of images of all tars by extension, most frequent first."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.stats.get("images", {}))
    return Counter(dict(counts.most_common()))


def _write_webdataset(artifact: Artifact, records: Sequence[ShardRecord], files: FileTransaction) -> None:
    """Write sizes and Energon's folder. A ``sizes.json`` beside the shards would block img2dataset's reruns into a
    folder, but nothing is ever downloaded into an export."""
    counts = {f"{r.shard}.tar": int(r.stats["samples"]) for r in records if r.stats["samples"]}
    digests = [str(r.files[name]["sha256"]) for r in records for name in r.files if name.endswith(".tar")]
    _write(files, SIZES, json.dumps(counts, indent=1).encode())
    _write(files, f"{energon.META}/dataset.yaml", energon.dataset_yaml(list(_images(records))))
    _write(files, f"{energon.META}/split.yaml", energon.split_yaml(counts))
    database = f"{energon.META}/index.sqlite"
    energon.write_database(files.path(database), (_indexed(artifact, r) for r in records if r.stats["samples"]))
    files.adopt(database)
    _write(files, f"{energon.META}/index.uuid", energon.index_uuid(digests))
    _write(files, f"{energon.META}/.info.json", energon.info_json(counts))  # last: marks the folder as prepared


def _indexed(artifact: Artifact, record: ShardRecord) -> energon.IndexedTar:
    name, folder = f"{record.shard}.tar", artifact.folder
    starts = array("Q", folder.read_bytes(f"{name}.idx"))
    rows = artifact.table(record.shard, ["key", "status"])
    parts = read_parquet(folder, f"{PARTS}/{record.shard}.parquet")
    keys = rows.filter(pc.equal(rows["status"], "ok")).column("key").to_pylist()
    return energon.IndexedTar(name, str(record.files[name]["sha256"]), keys, starts, parts)


def _parts(artifact: Artifact, records: Sequence[ShardRecord]) -> Iterator[BinaryIO]:
    for record in records:
        with artifact.folder.open(part_file(record.shard)) as file:
            yield file
