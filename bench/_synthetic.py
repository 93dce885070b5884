"""Artifacts of any size, made quickly: valid by `capipe verify`, written without a sync per file.

Images are tiny and each has bytes of its own; captions are a few words. Manifest and times are written in one go, in
the bytes that as many commits would have left.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from capipe.manifests import manifest, times
from capipe.manifests.artifact import Artifact
from capipe.manifests.files.tar import TarWriter
from capipe.manifests.manifest import ShardRecord
from capipe.manifests.schema import ANNOTATE, CAPTION, INGEST, SCORE
from capipe.manifests.shards import ROWS
from capipe.manifests.transaction import ROW_GROUP, shard_stats
from capipe.models.engines.loading import EngineConfig
from capipe.pipeline.jobs.annotate import AnnotateStage
from capipe.pipeline.jobs.export import plan_export
from capipe.pipeline.jobs.rows.engine import EngineSetup, StagePlan, plan
from capipe.stages.annotate.captioner import AnnotateConfig
from capipe.stages.annotate.prompts import parse_prompt
from capipe.stages.export.card import CardWords
from capipe.stages.export.energon import index_tar
from capipe.stages.export.source import PARTS

WORDS = ("a", "red", "green", "large", "square", "dog", "house", "left", "of", "the", "under", "sky", "street")
MODEL = "tiny/captioner"


@dataclass
class Direct:
    """Writes the shards of an artifact; :meth:`close` commits all of them and releases it."""

    artifact: Artifact
    _records: list[ShardRecord] = field(default_factory=list)

    def write(
        self, shard: str, files: Mapping[str, bytes | None], rows: int, info: Mapping[str, Any], **stats: Any
    ) -> None:
        """``files``: the shard's bytes by name, None for a file to name and not to write. ``info``: what it was made
        from."""
        named = {}
        for name, data in {**files, f"{shard}_stats.json": shard_stats({"ok": rows})}.items():
            if data is not None:
                self.artifact.folder.local(name).write_bytes(data)
            named[name] = {"bytes": len(data or b""), "sha256": hashlib.sha256(data or name.encode()).hexdigest()}
        self._records.append(ShardRecord(shard, {"ok": rows}, named, info, self.artifact.fingerprint, stats=stats))

    def close(self) -> list[ShardRecord]:
        entries = ({"shard": record.shard, "started": 0.0, "ended": 1.0, "seconds": 1.0} for record in self._records)
        self._append(times.LINES, (json.dumps(entry).encode() for entry in entries))
        self._append(manifest.LINES, map(manifest.written, self._records))
        self.artifact.close()
        return self._records

    def _append(self, name: str, lines: Iterator[bytes]) -> None:
        with self.artifact.folder.local(name).open("ab") as file:
            file.writelines(line + b"\n" for line in lines)


def build(folder: Path, shards: int, size: int, tars: int | None = None) -> None:
    """Images in shards of ``size``, their captions and scores, and an export of the images without its last files.

    ``tars``: how many shards have their tar; the others' are named in the manifest and missing, and there is no export.
    """
    total = {"shards_total": shards}
    images = Direct(Artifact.create(f"{folder}/images", "ingest", {}, {"sources": ["bench"], **total}))
    named = []
    for number in range(shards):
        shard, rows = f"{number:06d}", _images(range(number * size, (number + 1) * size))
        files = {f"{shard}.tar": rows.tar() if tars is None or number < tars else None}
        files[f"{shard}.parquet"] = _parquet(rows.listing(), INGEST)
        images.write(shard, files, size, {"digest": hashlib.sha256(shard.encode()).hexdigest()})
        named.append((rows.keys, rows.uids))
    records = images.close()
    _sidecars(folder, records, named)
    if tars is None:
        _export(folder, records)


def annotate(folder: Path, out: str) -> StagePlan:
    """A plan of `capipe annotate` over the images, with the bundled captioner."""
    config = AnnotateConfig(prompts=(parse_prompt("short"),))
    setup = EngineSetup(EngineConfig("transformers", MODEL), decode_workers=1)
    return plan(AnnotateStage(config, setup, MODEL), f"{folder}/images", f"{folder}/{out}")


@dataclass(frozen=True)
class _Rows:
    """``sums``: sha256 of the images, of which uids are the beginning."""

    keys: list[str]
    images: list[bytes]
    sums: list[str]

    @property
    def uids(self) -> list[str]:
        return [digest[:32] for digest in self.sums]

    def tar(self) -> bytes:
        out = io.BytesIO()
        writer = TarWriter(out)
        for key, image in zip(self.keys, self.images, strict=True):
            writer.add(f"{key}.jpg", image)
        writer.finish()
        return out.getvalue()

    def listing(self) -> dict[str, Any]:
        count = len(self.keys)
        sides = {"width": [8] * count, "height": [8] * count, "format": ["jpg"] * count}
        return {**_base(self.keys, self.uids), "sha256": self.sums, **sides, "source": self.keys}


def _images(numbers: range) -> _Rows:
    images = [_PICTURE + b"%d" % number for number in numbers]  # bytes after a JPEG's end are ignored
    return _Rows([f"{n:09d}" for n in numbers], images, [hashlib.sha256(image).hexdigest() for image in images])


def _picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 90)).save(out, "JPEG", quality=20)
    return out.getvalue()


_PICTURE = _picture()


def _base(keys: Sequence[str], uids: Sequence[str]) -> dict[str, Any]:
    return {"key": keys, "uid": uids, "status": ["ok"] * len(keys)}


def _parquet(columns: Mapping[str, Any], schema: pa.Schema) -> bytes:
    count = len(columns["key"])
    table = pa.table(
        [pa.array(columns.get(name, [None] * count), schema.field(name).type) for name in schema.names], schema=schema
    )
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", row_group_size=ROW_GROUP)
    return out.getvalue()


def _sidecars(folder: Path, records: Sequence[ShardRecord], named: Sequence[tuple[list[str], list[str]]]) -> None:
    """Captions and scores of the images."""
    random = np.random.default_rng(0)
    job = annotate(folder, "captions")
    captions = Direct(job.artifact)
    run = {"shards": f"{folder}/images", "captions": f"{folder}/captions", "shards_total": len(records)}
    made_of = {"input": Artifact.open(f"{folder}/images").fingerprint, "captions": job.artifact.fingerprint}
    scores = Direct(Artifact.create(f"{folder}/scores", "score", made_of, run))
    for record, (keys, uids) in zip(records, named, strict=True):
        texts, count = _texts(random, keys), len(keys)
        written = _parquet({**_base(keys, uids), "captions": _captions(texts)}, ANNOTATE)
        info = _made_of(folder, record)
        captions.write(record.shard, {f"{record.shard}.parquet": written}, count, info)
        columns = {"re_caption": texts, "re_length": [12] * count, "re_language": ["en"] * count}
        columns["re_clip_score"] = random.normal(0.3, 0.05, count).astype(np.float32)
        scored = _parquet({**_base(keys, uids), **columns}, SCORE)
        beside = {"companions": {"captions": hashlib.sha256(written).hexdigest()}}
        scores.write(record.shard, {f"{record.shard}.parquet": scored}, count, {**info, **beside})
    captions.close()
    scores.close()


def _texts(random: np.random.Generator, keys: Sequence[str]) -> list[str]:
    chosen = random.integers(0, len(WORDS), (len(keys), 11)).tolist()
    return [" ".join([WORDS[index] for index in row]) + f" {key}" for key, row in zip(keys, chosen, strict=True)]


def _captions(texts: Sequence[str]) -> pa.ListArray:
    count = len(texts)
    columns = {"name": ["short"] * count, "text": texts, "model": [MODEL] * count, "prompt_id": ["p"] * count}
    columns |= {"finish_reason": ["stop"] * count, "n_tokens": [12] * count, "attempts": [1] * count}
    columns["status"] = ["ok"] * count
    parts = [pa.array(columns[field.name], field.type) for field in CAPTION]
    return pa.ListArray.from_arrays(
        pa.array(range(count + 1), pa.int32()), pa.StructArray.from_arrays(parts, CAPTION.names)
    )


def _made_of(folder: Path, record: ShardRecord) -> dict[str, Any]:
    tar = record.files[f"{record.shard}.tar"]
    rows = record.files[f"{record.shard}.parquet"]["sha256"]
    url = f"{folder}/images/{record.shard}.tar"
    return {"url": url, "digest": tar["sha256"], "bytes": tar["bytes"], ROWS: rows}


def _export(folder: Path, records: Sequence[ShardRecord]) -> None:
    """The shards of `capipe export --image-extension keep`, with tars and listings linked."""
    planned = plan_export(f"{folder}/images", f"{folder}/export", "webdataset", CARD, image_extension="keep")
    out, source = Direct(planned.artifact), planned.source.folder
    planned.artifact.folder.private_folder("parts")
    for task, record in zip(planned.tasks, records, strict=True):
        files = {name: source.read_bytes(name) for name in record.files if not name.endswith("_stats.json")}
        index = index_tar(io.BytesIO(files[f"{record.shard}.tar"]), record.shard)
        files[f"{record.shard}.tar.idx"] = index.offsets()
        parts = io.BytesIO()
        pq.write_table(index.table(), parts, compression="zstd")
        files[f"{PARTS}/{record.shard}.parquet"] = parts.getvalue()
        made_of = task.made_of(planned.source, task.pieces[0])
        out.write(record.shard, files, record.count, made_of, samples=record.count, images={"jpg": record.count})
    out.close()


CARD = CardWords("scaling", "other")
