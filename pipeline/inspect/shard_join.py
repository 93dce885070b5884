"""Which shards of which artifacts tell of the same images, row by row: what lets a caption stand beside its picture.

A sidecar's manifest names the tar that each of its shards was made of by hash, so artifacts find each other wherever
they were moved together, and one that was made of other bytes is never joined.
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
from ...manifests.manifest import ShardRecord
from ..specs import artifact_spec


@dataclass(frozen=True)
class ShardName:
    """A shard of an artifact, by their names."""

    artifact: str
    shard: str


@dataclass(frozen=True)
class Tar:
    """A tar that may hold a shard's images: path or URL, and how many bytes it has where that is known.

    ``named``: by a manifest, so that it may be anywhere; else it lies in the folder of an artifact that was found.
    """

    location: str
    size: int | None
    named: bool = False

    @property
    def file(self) -> str:
        return self.location.rpartition("/")[2]


class ShardJoin:
    """A snapshot of what is committed in some artifacts. ``records``: by artifact and shard; ``damaged``: reasons."""

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
        # Roots first: an export's tar may be the very tar of the selection that it copied.
        for name, shard, record in sorted(self._all(), key=lambda each: not self._spec(each[0]).own_rows):
            if f"{shard}.tar" in record.files:
                self._tars.setdefault(str(record.files[f"{shard}.tar"]["sha256"]), ShardName(name, shard))
        self._same: dict[str, list[ShardName]] = defaultdict(list)
        for name, shard, _ in self._all():
            self._same[self.identity(ShardName(name, shard))].append(ShardName(name, shard))

    def _spec(self, name: str) -> ArtifactSpec:
        return artifact_spec(self.artifacts[name].stage)

    def _all(self) -> Iterator[tuple[str, str, ShardRecord]]:
        return ((name, shard, record) for name, shards in self.records.items() for shard, record in shards.items())

    def record(self, place: ShardName) -> ShardRecord:
        return self.records[place.artifact][place.shard]

    def identity(self, place: ShardName, _depth: int = 8) -> str:
        """The hash of the tar whose rows a shard's are; of what cannot be traced, a name that is nobody else's."""
        record, artifact = self.record(place), self.artifacts[place.artifact]
        own = record.files.get(f"{place.shard}.tar")
        if self._spec(place.artifact).own_rows or "shards" in record.input:  # an export's that is cut otherwise
            return str(own["sha256"]) if own else f"{artifact.fingerprint}/{place.shard}"
        made_of = str(record.input.get("digest"))
        source = self._tars.get(made_of)
        if source is None and "url" in record.input:
            return made_of  # tars of another tool, or an artifact that is elsewhere
        if source is None:
            parent = self._fingerprints.get(str(artifact.config["semantic"].get("input")))
            if parent is not None and place.shard in self.records[parent]:
                source = ShardName(parent, place.shard)
        if source is None or source == place or _depth == 0:
            return f"{artifact.fingerprint}/{place.shard}"
        return self.identity(source, _depth - 1)

    def beside(self, place: ShardName) -> list[ShardName]:
        """The shards of other artifacts with as many rows of the same images."""
        count = self.record(place).count
        others = self._same[self.identity(place)]
        return [each for each in others if each != place and self.record(each).count == count]

    def tars(self, place: ShardName) -> Iterator[Tar]:
        """Where the images of a shard may lie, the likeliest first."""
        for each in (place, *self.beside(place)):
            if f"{each.shard}.tar" in self.record(each).files:
                yield self._own(each)
        yield from _named(self.record(place).input)
        if self._spec(place.artifact).copies:  # under the same keys
            for made_of in self._inputs(place):
                yield from self._tars_of(made_of)

    def _own(self, place: ShardName) -> Tar:
        file = f"{place.shard}.tar"
        size = self.record(place).files.get(file, {}).get("bytes")
        return Tar(f"{self.artifacts[place.artifact].url}/{file}", size)

    def sources(self, place: ShardName, shard: str) -> Iterator[Tar]:
        """Where the images of a selected shard's rows were before, by ``source_shard``: of those filtered out, too."""
        for each in self._inputs(place):
            if each.get("name") == shard:
                yield from self._tars_of(each)

    def _inputs(self, place: ShardName) -> Iterator[Mapping[str, Any]]:
        """The shards that one was made of, where it is of several or of parts of one."""
        listed = self.record(place).input.get("shards")
        yield from (each for each in (listed if isinstance(listed, list) else []) if isinstance(each, Mapping))

    def _tars_of(self, made_of: Mapping[str, Any]) -> Iterator[Tar]:
        known = self._tars.get(str(made_of.get("digest")))
        if known is not None:
            yield self._own(known)
        yield from _named(made_of)

    def selected_from(self, place: ShardName) -> ShardName | None:
        """The select shard that an export copied, itself where it is one, else None."""
        if self._spec(place.artifact).source_key is not None:
            return place
        return next((each for each in self.beside(place) if self._spec(each.artifact).source_key is not None), None)


def _named(made_of: Mapping[str, Any]) -> Iterator[Tar]:
    """The tar that a manifest says a shard was made of."""
    url, size = made_of.get("url"), made_of.get("bytes")
    if isinstance(url, str) and tar_stem(url) is not None:
        yield Tar(url, size if isinstance(size, int) else None, named=True)
