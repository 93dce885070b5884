"""Files over all shards of an export: indexes, sizes, the list of conversations, the card.

They are written from the committed shards alone, so their bytes do not depend on earlier runs; and not again while
everything that goes into them is the same.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import BinaryIO

import pyarrow.compute as pc

from ...manifests.artifact import Artifact
from ...manifests.file_transaction import FileTransaction
from ...manifests.files.storage import read_parquet
from ...manifests.manifest import ShardRecord
from ...manifests.withdrawal.applied import encodes_anew
from ...stages import last_files
from ...stages.export import energon
from ...stages.export.card import CardWords, Contents, render
from ...stages.export.card_statistics import Statistics
from ...stages.export.formats import writer_class
from ...stages.export.llava import DATASET_INFO, dataset_info
from ...stages.export.provenance import Step, chain
from ...stages.export.source import PARTS
from ...stages.export.webdataset import SIZES
from ...stages.export.write import TAR_BYTES
from ...stages.export.writer import LooseWriter, ShardWriter, part_file
from ...stages.filter.index import is_index

CARD = "README.md"


def extras(writer: type[ShardWriter]) -> list[str]:
    """Files of an export that belong to no shard; `--fresh` removes them, too."""
    return [CARD, *writer.extras]


def write_files(artifact: Artifact, source: Artifact, words: CardWords, format: str, notes: Sequence[str]) -> None:
    """Write the files over all shards, unless they are there; each appears as a whole, the one that completes an index
    last."""
    records, steps = list(artifact.committed().values()), chain(source)
    facts = [format, asdict(words), list(notes), [asdict(step) for step in steps], _source_size(source, records)]
    digest = last_files.digest_of(artifact, facts)
    if last_files.are_there(artifact, digest):
        return
    with artifact.begin_files("extras") as files:
        _write(files, CARD, _card(artifact, source, words, format, records, notes, steps).encode())
        if format == "webdataset":
            _write_webdataset(artifact, records, files)
        if format == "messages":
            _write(files, DATASET_INFO, dataset_info())
        writer = writer_class(format)
        if issubclass(writer, LooseWriter):
            with files.writing(writer.listed) as file:
                for piece in writer.joined(_parts(artifact, records)):
                    file.write(piece)
        last_files.note(artifact, digest, files.publish())


def _write(files: FileTransaction, name: str, data: bytes) -> None:
    with files.writing(name) as file:
        file.write(data)


def _card(
    artifact: Artifact,
    source: Artifact,
    words: CardWords,
    format: str,
    records: Sequence[ShardRecord],
    notes: Sequence[str],
    steps: Sequence[Step],
) -> str:
    statistics = Statistics()
    for record in records:
        with artifact.parquet(record.shard) as parquet:
            statistics.add(parquet)
    size = _source_size(source, records)
    shards = sum(bool(record.stats["samples"]) for record in records)
    contents = Contents(format, shards, size, _images(records), notes, encodes_anew(artifact))
    return render(words, contents, statistics, steps)


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
