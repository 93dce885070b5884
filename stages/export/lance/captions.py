"""Columns of captions that are appended to a table: a data file more for each fragment, joined by key and uid.

Captions are those of the rows that were exported, or of the shards from which they had been selected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ....errors import BadInput
from ....manifests.artifact import Artifact
from ....manifests.file_transaction import FileTransaction
from ....manifests.files import bounded_json
from ....manifests.manifest import REPLACES, ShardRecord, made_of
from ....manifests.schema import SOURCE_UID
from ....manifests.status import Status
from ..provenance import public
from ..source import committed_listing, listing
from .schema import DATA, STORAGE, caption_schema, data_file, fragment_file, table_schema, with_captions
from .writer import describe, write_fragment

APPENDED = "appended"  # key of a shard's statistics: the captions in its fragment, by set, as a digest; and of the run
_STAGE = "annotate"
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_]*)=(.+)", re.DOTALL)
_ODD = re.compile(r"[^A-Za-z0-9_]+")
_ORIGIN = ("source_shard", "source_key")  # columns of a selection's rows
_BATCH = 1000


@dataclass(frozen=True)
class CaptionSet:
    """Captions to append. ``columns``: the table's column of each caption, by its name in the artifact.
    ``direct``: they are of the shards that are exported, not of those from which these had been selected."""

    name: str
    artifact: Artifact
    columns: Mapping[str, str]
    direct: bool = True

    @cached_property
    def digest(self) -> str:
        """Identity of the captions as they are now."""
        return self.artifact.manifest_digest()

    @property
    def facts(self) -> dict[str, Any]:
        """What is noted of them, in the form of JSON."""
        run = self.artifact.config["run"]
        about = {"model": public(run.get("model")), "prompts": [list(pair) for pair in self.artifact.prompts()]}
        columns = [[column, name] for name, column in self.columns.items()]  # in the table's order
        return {"name": self.name, "fingerprint": self.artifact.fingerprint, "columns": columns, **about}


def open_set(given: str) -> CaptionSet:
    """The captions of ``[NAME=]ARTIFACT``. Raises BadInput unless they are there, and complete."""
    named = _NAMED.fullmatch(given)
    name, url = (named[1], named[2]) if named else ("caption", given)
    artifact = Artifact.open(url)
    if artifact.stage != _STAGE:
        text = f"--append-captions {url}: an artifact of stage {artifact.stage!r} without captions"
        raise BadInput(f"{text}; give one that `capipe annotate` wrote")
    total, there = artifact.config["run"].get("shards_total"), len(artifact.committed())
    if there != total:
        text = f"--append-captions {url}: {there} of {total} shards are committed"
        raise BadInput(f"{text}; run `capipe annotate` to the end first")
    samples = artifact.config["semantic"]["annotate"].get("samples", 1)
    prompts = [prompt for prompt, _ in artifact.prompts()]
    captions = prompts if samples == 1 else [f"{prompt}#{k}" for prompt in prompts for k in range(samples)]
    return CaptionSet(name, artifact, {caption: _ODD.sub("_", f"{name}_{caption}") for caption in captions})


def check_columns(rows: pa.Schema, sets: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadInput if two columns of a table would have one name. ``sets``: facts on all appended captions."""
    taken = dict.fromkeys(table_schema(rows).names, "the table's own")
    for entry in sets:
        for column, caption in entry["columns"]:
            if column in taken:
                text = f"--append-captions: the column {column} of caption {caption!r} is there already"
                raise BadInput(f"{text} ({taken[column]}); name these otherwise: --append-captions NAME=ARTIFACT")
            taken[column] = f"of {entry['name']}"


def full_schema(rows: pa.Schema, sets: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """A table's columns, with those of all appended captions."""
    return with_captions(table_schema(rows), [column for entry in sets for column, _ in entry["columns"]])


def fitted(captions: CaptionSet, source: Artifact, record: ShardRecord) -> CaptionSet:
    """The set, joined as its rows are to be found. Raises BadInput unless it has those of a shard of the source."""
    direct = captions.artifact.config["semantic"].get("input") == source.fingerprint
    ways = [replace(captions, direct=way) for way in ((True,) if direct else (False, True))]
    problems = []
    for way in ways:
        try:
            _join(way, source, record, [record.shard])
        except BadInput as error:
            problems.append(error)
        else:
            return way
    raise problems[0]


def append_captions(
    record: ShardRecord,
    artifact: Artifact,
    captions: Sequence[CaptionSet],
    sets: Sequence[Mapping[str, Any]],
) -> ShardRecord:
    """Commit a shard anew with further columns; its other files stay as they are, untouched.

    ``captions``: those to write, or to write again; ``sets``: facts on all that the table has then.
    """
    done = {entry.name: entry.digest for entry in captions}
    stats = {name: value for name, value in record.stats.items() if name not in (REPLACES, APPENDED)}
    stats[APPENDED] = {**record.stats.get(APPENDED, {}), **done}
    with artifact.begin_files(record.shard, over=record) as out:
        note = fragment_file(record.shard)
        if note not in record.files:  # no row is ok
            for name in record.files:
                out.keep(name)
            return out.commit(rows=record.rows, input_info=record.input, stats=stats)
        fragment = bounded_json.load_from(artifact.folder, note)
        others = [file for file in fragment["files"] if _set_of(record.shard, file["path"]) not in done]
        kept = {listing(record.shard), f"{record.shard}_stats.json", *(f"{DATA}/{file['path']}" for file in others)}
        for name in record.files:
            if name in kept:
                out.keep(name)
        with committed_listing(artifact, record) as listed:
            schema = full_schema(listed.schema_arrow, sets)
        shards = [entry["name"] for entry in made_of(record)]
        names = []
        for entry in captions:
            table = _join(entry, artifact, record, shards)
            names.append(_write(out, record.shard, entry.name, table))
        write_fragment(out, record.shard, fragment["physical_rows"], schema, [*others, *describe(out, names, schema)])
        return out.commit(rows=record.rows, input_info=record.input, stats=stats)


def _set_of(shard: str, path: str) -> str:
    """The set of captions that a data file of a shard holds; empty for the shard's own."""
    return path.removeprefix(f"{shard}-").rpartition("-")[0]


def _write(out: FileTransaction, shard: str, name: str, table: pa.Table) -> str:
    from lance.file import LanceFileWriter

    scratch = f"{DATA}/{shard}-{name}.lance"
    with LanceFileWriter(str(out.path(scratch)), table.schema, version=STORAGE) as file:
        file.write_batch(table)
    return out.adopt(scratch, lambda sha256: data_file(shard, name, sha256))


def _join(captions: CaptionSet, artifact: Artifact, record: ShardRecord, shards: Sequence[str]) -> pa.Table:
    """Captions of a shard's ok rows, in their order; null where the captioner gave none.

    ``artifact``: whose shard it is; ``shards``: those of the source that it was made of. Raises BadInput for a row that
    the captions do not know, or know with another image: by its uid, and of one encoded anew by that in its source.
    """
    with committed_listing(artifact, record) as listed:
        origin = [name for name in _ORIGIN if name in listed.schema_arrow.names]
        before = [SOURCE_UID] if SOURCE_UID in listed.schema_arrow.names else []  # of images encoded anew
        rows = listed.read(columns=["key", "uid", "status", *before, *origin], use_threads=False)
    rows = rows.filter(pc.equal(rows["status"], str(Status.OK)))
    uids = list(zip(*(rows[name].to_pylist() for name in ("uid", *before)), strict=True))
    texts: dict[str, list[str | None]] = {column: [None] * len(uids) for column in captions.columns.values()}
    where = captions.artifact.url
    if not captions.direct and (len(origin) < len(_ORIGIN) or rows[_ORIGIN[0]].null_count):
        text = f"--append-captions {where}: captions of other shards than were exported"
        raise BadInput(f"{text}; caption these: capipe annotate --shards {artifact.config['run'].get('shards', '…')}")
    wanted = _places(rows, shards, captions.direct)
    for shard, keys in wanted.items():
        known = captions.artifact.committed().get(shard)
        for row in () if known is None else _rows(captions.artifact, known):
            number = keys.pop(row["key"], None)
            if number is None:
                continue
            if row["uid"] not in uids[number]:
                text = f"--append-captions {where}: {row['key']!r} of shard {shard} is another image there"
                raise BadInput(f"{text} ({row['uid']}, not {uids[number][-1]}); give captions of the exported images")
            for caption in row["captions"] or ():
                if caption["status"] == Status.OK and caption["name"] in captions.columns:
                    texts[captions.columns[caption["name"]]][number] = caption["text"]
    for shard, keys in wanted.items():
        for key, number in keys.items():
            text = f"--append-captions {where}: has no row for {key!r} of shard {shard} (uid {uids[number][-1]})"
            raise BadInput(f"{text}; give captions of the exported images")
    return pa.table(texts, schema=caption_schema(texts))


def _places(rows: pa.Table, shards: Sequence[str], direct: bool) -> dict[str, dict[str, int]]:
    """Row numbers by shard and key of the captions. Shards that were merged have no key twice, so they share one
    dictionary."""
    if direct:
        numbers = {key: number for number, key in enumerate(rows["key"].to_pylist())}
        return dict.fromkeys(shards, numbers)
    found: dict[str, dict[str, int]] = {}
    for number, place in enumerate(zip(*(rows[name].to_pylist() for name in _ORIGIN), strict=True)):
        found.setdefault(place[0], {})[place[1]] = number
    return found


def _rows(artifact: Artifact, record: ShardRecord) -> list[dict[str, Any]]:
    with committed_listing(artifact, record) as listed:
        rows: list[dict[str, Any]] = listed.read(columns=["key", "uid", "captions"], use_threads=False).to_pylist()
        return rows
