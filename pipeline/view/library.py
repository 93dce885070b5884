"""Artifacts below one folder, by id; reloaded when their manifests change, so that a refresh shows new commits."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...manifests.artifact import CONFIG
from ...manifests.files.allowed import Allowed
from ...manifests.files.image_types import COMMON, IMAGE_TYPES
from ...manifests.files.outside import is_url
from ...manifests.files.storage import Folder
from ...manifests.manifest import LINES
from ...manifests.object_store.log import OBJECTS
from ...models.images.formats import HEAD_BYTES, sniff
from ..inspect.discover import HERE, Found, find
from ..inspect.images import Cache, RowImages, small_jpeg
from ..inspect.shard_join import ShardJoin, ShardName
from ..report.facts import models_of
from ..specs import artifact_spec
from .table import Arrays, Table, Unknown

_LOOK = 1.0  # seconds between two checks of the manifests
_WALK = 10.0  # seconds between two scans of the folders
_REMOTE = 30  # in a store it is that much rarer
_SHARE = 10  # times as long as a reload took: until the next
_THUMBNAIL = 256  # pixels
_TYPES = {name: IMAGE_TYPES[name].media_type for name in COMMON}  # that browsers show as they are


class Library:
    """Artifacts, tables and images of the viewer; thread-safe."""

    def __init__(self, root: str | Path, images: Sequence[str] = ()) -> None:
        """``root``: a folder or URL. ``images``: folders and URLs below which tars may be read. Raises BadInput if
        ``root`` has no artifact."""
        self.root = str(root).rstrip("/") or "/"
        self._remote = is_url(self.root)
        self._lock = threading.Lock()
        self._images = RowImages(Allowed(self.root, tuple(images)))
        self._small: Cache[tuple[str, str], bytes] = Cache(64 << 20, len)
        self._arrays: Arrays = Cache(512 << 20, lambda array: int(array.nbytes))
        self._tables: dict[str, Table] = {}
        self._found, self._join, self._stamps = self._walk()
        self._walked = time.monotonic()
        self._look_after = self._next_look(self._walked)
        if not self._found.artifacts:
            raise BadInput(f"{root}: no artifact that could be read in it; `capipe status` says what is there")

    def _walk(self) -> tuple[Found, ShardJoin, dict[str, object]]:
        contents = find(self.root)
        stamps = {name: self._stamp(name) for name in contents.artifacts}  # first: later changes are noticed next time
        return contents, ShardJoin(contents.artifacts), stamps

    def _reload(self, changed: bool) -> None:
        """Look for artifacts, and read their manifests anew if one has ``changed`` or come or gone. Raises BadInput."""
        if not changed:
            before, self._found = self._found, find(self.root)
            if self._found.artifacts.keys() == before.artifacts.keys():
                return
        self._found, self._join, self._stamps = self._walk()
        self._tables = {}

    def _stamp(self, name: str) -> object:
        """Changes with each commit."""
        if self._remote:
            return Folder(self.root if name == HERE else f"{self.root}/{name}").marks(OBJECTS)
        stamps = []
        for file in (LINES, CONFIG):
            try:
                stat = Path(self.root, name, file).stat()
                stamps.append((stat.st_mtime_ns, stat.st_size))
            except OSError:
                stamps.append((0, 0))
        return tuple(stamps)

    def refresh(self) -> None:
        """Reload if there are new commits."""
        with self._lock:
            now = time.monotonic()
            if now < self._look_after:
                return
            changed = any(self._stamp(name) != stamp for name, stamp in self._stamps.items())
            if changed or now - self._walked > _WALK * (_REMOTE if self._remote else 1):
                with suppress(BadInput):  # the folder is being moved or emptied: keep the last state
                    self._reload(changed)
                self._walked = now
            self._look_after = self._next_look(now)

    def _next_look(self, started: float) -> float:
        """Looking into a store takes requests, and reading manifests time: more of both for more shards."""
        now = time.monotonic()
        if self._remote:
            return now + max(_LOOK * _REMOTE, _REMOTE * (now - started))
        return now + max(_LOOK, _SHARE * (now - started))

    # --- artifacts ---------------------------------------------------------------------------------------------------

    def catalog(self) -> dict[str, Any]:
        """All artifacts with their counts, inputs first."""
        self.refresh()
        join, contents = self._join, self._found
        entries = []
        for name, records in join.records.items():
            artifact = join.artifacts[name]
            rows: dict[str, int] = {}
            for record in records.values():
                for status, count in record.rows.items():
                    rows[status] = rows.get(status, 0) + count
            entries.append(
                {
                    "id": id_of(name),
                    "name": name,
                    "stage": artifact.stage,
                    "models": list(models_of(artifact)),
                    "rows": dict(sorted(rows.items())),
                    "shards": len(records),
                    "shards_total": artifact.config["run"].get("shards_total"),
                }
            )
        damaged = {**contents.damaged, **join.damaged}
        return {
            "folder": self.root.rpartition("/")[2] if self._remote else Path(self.root).resolve().name,
            "artifacts": entries,
            "start": _start(entries),
            "damaged": damaged,
        }

    def table(self, artifact_id: str) -> Table:
        """An artifact by id. Raises Unknown. An id is looked up in the list of artifacts and never used as a path."""
        self.refresh()
        with self._lock:
            known = self._tables.get(artifact_id)
            if known is not None:
                return known
            join = self._join
        name = next((name for name in join.records if id_of(name) == artifact_id), None)
        if name is None:
            raise Unknown("no such artifact; the list on the left has those that are there")
        table = Table(join, name, self._arrays)
        with self._lock:
            if join is self._join:
                self._tables[artifact_id] = table
        return table

    # --- images ------------------------------------------------------------------------------------------------------

    def refusals(self, table: Table, shards: Iterable[str]) -> list[str]:
        """Reasons for not showing images of these shards, other than missing images."""
        refused = (self._images.refusal(table.join, ShardName(table.name, shard)) for shard in dict.fromkeys(shards))
        reasons = [reason for reason in refused if reason is not None]
        return [f"Images are not shown: {reasons[0]}."] if reasons else []

    def image(self, artifact_id: str, shard: str, row: int, small: bool) -> tuple[bytes, str]:
        """A row's image and its media type: a thumbnail JPEG, or the original bytes. Raises Unknown."""
        table = self.table(artifact_id)
        named = table.row_name(shard, row)
        stamp = f"{table.stamp(shard)}/{row}"
        if small and (known := self._small.get((artifact_id, stamp))) is not None:
            return known, "image/jpeg"
        data = self._images.of(table.join, ShardName(table.name, shard), named)
        if data is None:
            reason = self._images.refusal(table.join, ShardName(table.name, shard))
            raise Unknown("there is no image of this row" + (f": {reason}" if reason else ""))
        kind = sniff(data[:HEAD_BYTES])
        if not small and isinstance(kind, str) and kind in _TYPES:
            return data, _TYPES[kind]
        shown = small_jpeg(data, _THUMBNAIL if small else 2048)
        if shown is None:
            raise Unknown("the image of this row cannot be decoded")
        if small:
            self._small.put((artifact_id, stamp), shown)
        return shown, "image/jpeg"


def id_of(name: str) -> str:
    """Id of an artifact: a hash of its name, so that URLs stay valid."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _start(entries: Sequence[Mapping[str, Any]]) -> str:
    """Id of the artifact to show first: captions, else scores or a selection, else any; "" without artifacts."""
    committed = [(entry["id"], artifact_spec(entry["stage"])) for entry in entries if entry["shards"]]
    captioned = [name for name, spec in committed if spec.shown == "captions"]
    scored = [name for name, spec in committed if spec.histograms]
    return next(iter([*captioned, *scored, *(entry["id"] for entry in entries)]), "")
