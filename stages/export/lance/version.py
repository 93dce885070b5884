"""Versions of an export's Lance table: which fragments count is what the manifest says, committed once all are there.

Lance reads and commits in a copy of the table's version files, which are small and name data files by relative paths;
what it wrote is then published like any other file. So the table may be wherever an artifact may be, and Lance opens
nothing there. A version holds a time and a random id; everything else of it follows from the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from ....errors import ArtifactMismatch, BadInput
from ....manifests.artifact import Artifact
from ....manifests.file_transaction import FileTransaction
from ....manifests.files import bounded_json
from ....manifests.files.storage import Folder
from ....manifests.manifest import ShardRecord
from .schema import DATA, METADATA, TABLE, columns_digest, fragment_file

VERSIONS, TRANSACTIONS = f"{TABLE}/_versions", f"{TABLE}/_transactions"
_MANIFEST = ".manifest"
NOTE = "table_version"  # key of a configuration's facts about the run: the version committed last
_MESSAGE = "capipe"  # first word of our commits' messages
_FACTS = ("path", "fields", "column_indices", "file_major_version", "file_minor_version")  # of a data file


@dataclass(frozen=True)
class Table:
    """The latest version in a copy of the version files. ``number``: 0 without any. ``fragments``: rows and data files,
    as :func:`planned` gives them."""

    number: int = 0
    columns: str = ""
    metadata: Mapping[str, Any] | None = None
    fragments: tuple[Any, ...] = ()
    ours: bool = True
    older: Mapping[int, frozenset[str]] = field(default_factory=dict)  # data files of the versions before it

    def is_of(self, schema: pa.Schema, fragments: Sequence[Mapping[str, Any]]) -> bool:
        """True if this version has just these columns, metadata and fragments."""
        return self.has(schema, fragments) and self.metadata == _metadata(schema)

    def has(self, schema: pa.Schema, fragments: Sequence[Mapping[str, Any]]) -> bool:
        """True if this version has just these columns and fragments."""
        found = (self.columns, list(self.fragments))
        return self.number > 0 and found == (columns_digest(schema), [*map(_facts, fragments)])


def planned(artifact: Artifact, records: Sequence[ShardRecord], schema: pa.Schema) -> list[dict[str, Any]]:
    """Fragments of the committed shards, in their order. Raises ArtifactMismatch for one with other columns."""
    fragments = []
    for record in records:
        if not record.stats["samples"]:
            continue
        name = fragment_file(record.shard)
        try:
            note = bounded_json.load_from(artifact.folder, name)
            found, files, rows = note["columns"], list(note["files"]), int(note["physical_rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactMismatch(f"{artifact.url}/{name}: cannot be read ({error}); use --fresh") from None
        if found != columns_digest(schema):
            text = f"{artifact.url}/{name}: of other columns than the first shard has"
            raise ArtifactMismatch(f"{text}; run the stage that made its source again with --fresh")
        fragments.append({"physical_rows": rows, "files": files})
    return fragments


def read_table(folder: Folder, place: Path) -> Table:
    """The latest version. ``place``: an empty folder for the copy, which then is a table without data."""
    import lance

    names = [f"{VERSIONS}/{name}" for name in folder.names(VERSIONS) if name.endswith(_MANIFEST)]
    if not names:
        return Table()
    for name in [*names, *(f"{TRANSACTIONS}/{name}" for name in folder.names(TRANSACTIONS))]:
        target = place / name.removeprefix(f"{TABLE}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(folder.read_bytes(name))
    try:
        table = lance.dataset(str(place))
        fragments = _fragments(table)
        message = _message(table.read_transaction(table.version))
        numbers = [entry["version"] for entry in table.versions() if entry["version"] != table.version]
        older = {number: _names(_fragments(lance.dataset(str(place), version=number))) for number in numbers}
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactMismatch(f"{folder.url}/{TABLE}: its versions cannot be read ({error}); use --fresh") from None
    schema = table.schema
    ours = message.startswith(_MESSAGE)
    return Table(table.version, columns_digest(schema), _metadata(schema), fragments, ours, older)


def _message(transaction: Any) -> str:
    """Message of a commit; empty without any."""
    known = transaction.transaction_properties if transaction is not None else None
    return str((known or {}).get("__lance_commit_message", ""))


def _fragments(table: Any) -> tuple[dict[str, Any], ...]:
    return tuple(_facts(fragment.metadata.to_json()) for fragment in table.get_fragments())


def _names(fragments: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(f"{DATA}/{file['path']}" for fragment in fragments for file in fragment["files"])


def _facts(fragment: Mapping[str, Any]) -> dict[str, Any]:
    files = [{name: file[name] for name in _FACTS} for file in fragment["files"]]
    return {"physical_rows": fragment["physical_rows"], "files": files}


def _metadata(schema: pa.Schema) -> Any:
    return bounded_json.parse((schema.metadata or {}).get(METADATA, b"null"))


def refuse_foreign(folder: Folder, noted: int | None) -> None:
    """Raises BadInput if a table's latest version is somebody else's, that a commit would undo. ``noted``: our last."""
    if noted is not None and is_latest(folder, noted):
        return
    with TemporaryDirectory() as place:
        _refuse_foreign(folder, read_table(folder, Path(place)))


def is_latest(folder: Folder, number: int) -> bool:
    """True if a table has this version and no later one. One listing."""
    names = [name for name in folder.names(VERSIONS) if name.endswith(_MANIFEST)]
    return f"{VERSIONS}/{min(names, default='')}" == _version_file(number)  # numbered backwards


def _version_file(number: int) -> str:
    return f"{VERSIONS}/{2**64 - 1 - number:020d}{_MANIFEST}"


def _refuse_foreign(folder: Folder, table: Table) -> None:
    if not table.ours:
        text = f"{folder.url}/{TABLE}: version {table.number} of the table is not capipe's (a column, an index, rows"
        raise BadInput(f"{text} were changed by another program), and would be undone; export to another --out")


def commit_version(
    files: FileTransaction, folder: Folder, schema: pa.Schema, fragments: Sequence[Mapping[str, Any]], fingerprint: str
) -> tuple[int, list[str]]:
    """Commit a new version of the table into a transaction, unless the latest one is just that.

    Returns its number, and version files to remove once it is published: those of versions that name data files which
    are gone.
    """
    import lance
    from lance.fragment import FragmentMetadata

    place = files.path(TABLE)
    before = read_table(folder, place)
    _refuse_foreign(folder, before)
    old = set(_copied(place))
    if not before.is_of(schema, fragments):
        numbered = [{"id": number, **fragment} for number, fragment in enumerate(fragments)]
        listed = [FragmentMetadata.from_json(json.dumps(fragment)) for fragment in numbered]
        number = lance.LanceDataset.commit(
            str(place),
            lance.LanceOperation.Overwrite(schema, listed),
            read_version=before.number or None,
            enable_v2_manifest_paths=True,
            commit_message=f"{_MESSAGE} {fingerprint}",
        ).version
        for name in sorted(set(_copied(place)) - old, key=lambda name: name.startswith(VERSIONS)):  # that one last
            files.adopt(name)
        older = {**before.older, before.number: _names(before.fragments)}
    else:
        number, older = before.number, dict(before.older)
    gone = [version for version, names in older.items() if not names <= _names(fragments)]
    return int(number), [name for name in sorted(old) if any(_is_of_version(name, version) for version in gone)]


def _is_of_version(name: str, number: int) -> bool:
    """True for the files of a version, by the names that Lance gives them."""
    return name == _version_file(number) or name.startswith(f"{TRANSACTIONS}/{number - 1}-")


def _copied(place: Path) -> Iterator[str]:
    """Names of the version files in a copy, without Lance's hint which is the latest, a file that would be replaced."""
    for path in place.rglob("*"):
        if path.suffix in (_MANIFEST, ".txn"):
            yield f"{TABLE}/{path.relative_to(place).as_posix()}"


def is_version_file(name: str) -> bool:
    """True for files of a table's versions, which hold a time and a random id."""
    return name.startswith((f"{VERSIONS}/", f"{TRANSACTIONS}/"))


def faults(artifact: Artifact, records: Sequence[ShardRecord], schema: pa.Schema, place: Path) -> Iterator[str]:
    """Faults unless the table's latest version has just the committed fragments."""
    try:
        table = read_table(artifact.folder, place)
        fragments = planned(artifact, records, schema)
    except ArtifactMismatch as error:
        yield str(error).removeprefix(f"{artifact.url}/")
        return
    if not table.number:
        yield f"{TABLE}: has no version; run the same command again"
    elif table.ours and not table.has(schema, fragments):
        text = f"{TABLE}: version {table.number} is not of the committed shards"
        yield f"{text}; remove its _versions, and run the same command again"
