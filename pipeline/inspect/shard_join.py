"""Row-by-row join of different artifacts' shards with the same images.

A sidecar's manifest records the hash of each shard's input tar, so artifacts that were moved together still join, and
an artifact with different input bytes never does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CapipeError
from ...manifests.artifact import Artifact
from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.files.compressed import tar_stem
from ...manifests.files.tar import unsafe_name
from ...manifests.joining.index_tars import is_index
from ...manifests.manifest import ShardRecord
from ..specs import artifact_spec


@dataclass(frozen=True)
class ShardName:
    """A shard of an artifact, by name."""

    artifact: str
    shard: str


@dataclass(frozen=True)
class Tar:
    """A tar that may hold a shard's images: path or URL, and size in bytes if known.

    ``named``: a manifest names it, so it may be anywhere; else it lies in the folder of a known artifact.
    """

    location: str
    size: int | None
    named: bool = False

    @property
    def file(self) -> str:
        return self.location.rpartition("/")[2]


class ShardJoin:
    """A snapshot of committed shards. ``records``: by artifact and shard; ``damaged``: reasons by artifact."""

    def __init__(self, artifacts: Mapping[str, Artifact]) -> None:
        self.artifacts = dict(artifacts)
        self.records: dict[str, dict[str, ShardRecord]] = {}
        self.damaged: dict[str, str] = {}
        for name, artifact in artifacts.items():
            try:
                self.records[name] = {
                    shard: record for shard, record in artifact.committed().items() if unsafe_name(shard) is None
                }
            except (CapipeError, OSError) as error:
                self.damaged[name] = str(error)
        self._fingerprints = {self.artifacts[name].fingerprint: name for name in self.records}
        self._tars: dict[str, ShardName] = {}
        # Roots first: an export's tar may be identical to the tar of the selection that it copied.
        for name, shard, record in sorted(self._all(), key=lambda item: not self._spec(item[0]).own_rows):
            if (mark := self._mark(name, shard, record)) is not None:
                self._tars.setdefault(mark, ShardName(name, shard))
        self._same: dict[str, list[ShardName]] = defaultdict(list)
        for name, shard, _ in self._all():
            self._same[self.identity(ShardName(name, shard))].append(ShardName(name, shard))

    def _spec(self, name: str) -> ArtifactSpec:
        return artifact_spec(self.artifacts[name].stage)

    def _mark(self, name: str, shard: str, record: ShardRecord) -> str | None:
        """Hash of a shard's tar, or of its Parquet if it is of an index: what an export names as its input."""
        if f"{shard}.tar" in record.files:
            return str(record.files[f"{shard}.tar"]["sha256"])
        return str(record.files[f"{shard}.parquet"]["sha256"]) if is_index(self.artifacts[name]) else None

    def _all(self) -> Iterator[tuple[str, str, ShardRecord]]:
        return ((name, shard, record) for name, shards in self.records.items() for shard, record in shards.items())

    def record(self, shard_name: ShardName) -> ShardRecord:
        return self.records[shard_name.artifact][shard_name.shard]

    def identity(self, shard_name: ShardName, _depth: int = 8) -> str:
        """Hash of the tar with a shard's rows, of the Parquet of an index; a unique name if it cannot be traced."""
        record, artifact = self.record(shard_name), self.artifacts[shard_name.artifact]
        if self._spec(shard_name.artifact).own_rows or "shards" in record.input:  # an export with other shard bounds
            mark = self._mark(shard_name.artifact, shard_name.shard, record)
            return mark or f"{artifact.fingerprint}/{shard_name.shard}"
        digest = str(record.input.get("digest"))
        source = self._tars.get(digest)
        if source is None and "url" in record.input:
            return digest  # tars of another tool, or an artifact in another folder
        if source is None:
            parent = self._fingerprints.get(str(artifact.config["semantic"].get("input")))
            if parent is not None and shard_name.shard in self.records[parent]:
                source = ShardName(parent, shard_name.shard)
        if source is None or source == shard_name or _depth == 0:
            return f"{artifact.fingerprint}/{shard_name.shard}"
        return self.identity(source, _depth - 1)

    def beside(self, shard_name: ShardName) -> list[ShardName]:
        """Shards of other artifacts with the same images and number of rows."""
        count = self.record(shard_name).count
        others = self._same[self.identity(shard_name)]
        return [other for other in others if other != shard_name and self.record(other).count == count]

    def tars(self, shard_name: ShardName) -> Iterator[Tar]:
        """Tars that may hold a shard's images, most likely first."""
        for holder in (shard_name, *self.beside(shard_name)):
            if f"{holder.shard}.tar" in self.record(holder).files:
                yield self._own(holder)
        yield from _named(self.record(shard_name).input)
        if self._spec(shard_name.artifact).copies:  # under the same keys
            for source in self._inputs(shard_name):
                yield from self._tars_of(source)

    def _own(self, shard_name: ShardName) -> Tar:
        file = f"{shard_name.shard}.tar"
        size = self.record(shard_name).files.get(file, {}).get("bytes")
        return Tar(f"{self.artifacts[shard_name.artifact].url}/{file}", size)

    def sources(self, shard_name: ShardName, shard: str) -> Iterator[Tar]:
        """Source tars of a selected shard's rows, by ``source_shard``, including filtered rows."""
        for source in self._inputs(shard_name):
            if source.get("name") == shard:
                yield from self._tars_of(source)

    def _inputs(self, shard_name: ShardName) -> Iterator[Mapping[str, Any]]:
        """Input shards of a shard made from several, or from parts of one."""
        listed = self.record(shard_name).input.get("shards")
        yield from (entry for entry in (listed if isinstance(listed, list) else []) if isinstance(entry, Mapping))

    def _tars_of(self, source: Mapping[str, Any]) -> Iterator[Tar]:
        known = self._tars.get(str(source.get("digest")))
        if known is not None and f"{known.shard}.tar" not in self.record(known).files:  # of an index
            for original in self._inputs(known):
                yield from self._known(original)
                yield from _named(original)
            return
        yield from self._known(source)
        yield from _named(source)

    def _known(self, source: Mapping[str, Any]) -> Iterator[Tar]:
        """The tar of these bytes in one of the artifacts."""
        known = self._tars.get(str(source.get("digest")))
        if known is not None and f"{known.shard}.tar" in self.record(known).files:
            yield self._own(known)

    def selected_from(self, shard_name: ShardName) -> ShardName | None:
        """The select shard that an export copied; the shard itself if it is one; else None."""
        if self._spec(shard_name.artifact).source_key is not None:
            return shard_name
        beside = self.beside(shard_name)
        return next((other for other in beside if self._spec(other.artifact).source_key is not None), None)


def _named(source: Mapping[str, Any]) -> Iterator[Tar]:
    """Input tar named by a manifest."""
    url, size = source.get("url"), source.get("bytes")
    if isinstance(url, str) and tar_stem(url) is not None:
        yield Tar(url, size if isinstance(size, int) else None, named=True)
