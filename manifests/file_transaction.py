"""Transaction for one shard of whole files: written under scratch names, renamed, then added to the manifest.

For stages that produce complete files (an export); :class:`~.transaction.ShardTransaction` is the one for rows.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import DamagedShard
from .files.names import checked_name
from .files.storage import Folder, clear, sync
from .manifest import REPLACES, ShardRecord
from .publishing import publish
from .sharing.claims import Claim, holding, scratch_of
from .transaction import HashedFile, new_scratch

_CHUNK = 1 << 20


class FileTransaction:
    """Context manager: create files, ``commit`` once; leaving without a commit removes every trace.

    ``over``: the committed version to replace, which stays until the commit.
    """

    def __init__(
        self,
        folder: Folder,
        fingerprint: str,
        shard: str,
        replaces: Sequence[str] = (),
        over: ShardRecord | None = None,
        generation: str = "",
        claim: Claim | None = None,
    ) -> None:
        self.shard, self._folder, self._fingerprint = shard, folder, fingerprint
        self._replaces, self._over, self._generation = replaces, over, generation
        self._claim, self._scratch = claim, new_scratch(folder, scratch_of(claim), shard)
        self._files: dict[str, dict[str, Any]] = {}
        self._trees: list[str] = []
        self._kept: set[str] = set()
        self._started = time.time()

    def path(self, name: str) -> Path:
        """Path of ``name`` until the commit."""
        path = self._scratch / checked_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[HashedFile]:
        """A file to write from start to end; it is added to the shard when the body completes."""
        file = HashedFile(self.path(name))
        try:
            yield file
            self._files[name] = file.finish()
        finally:
            file.abandon()

    def copy(self, source: BinaryIO, name: str, sha256: str, where: str) -> None:
        """Copy a file byte for byte. Raises ArtifactMismatch, naming ``where``, if it does not match ``sha256``."""
        with self.writing(name) as file:
            while data := source.read(_CHUNK):
                file.write(data)
        _compare(str(self._files[name]["sha256"]), sha256, where)

    def link(self, source: Path, name: str, sha256: str) -> None:
        """Hard-link a file under a second name, on the same file system; its bytes are checked as in :meth:`copy`."""
        path = self.path(name)
        os.link(source.resolve(), path)  # the target of a symbolic link: a relative link would resolve differently here
        self.adopt(name)
        _compare(str(self._files[name]["sha256"]), sha256, str(source))

    def adopt(self, name: str, named: Callable[[str], str] | None = None) -> str:
        """Add a file that other code wrote to :meth:`path`; returns its name, which ``named`` makes of its sha256."""
        path, digest = self.path(name), hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
        sync(path)
        if named is not None:
            name = named(digest.hexdigest())
            path = path.replace(self.path(name))
        self._files[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        return name

    @property
    def written(self) -> Mapping[str, Mapping[str, Any]]:
        """Size and sha256 of the files so far, by name."""
        return self._files

    def keep(self, name: str) -> None:
        """Leave a file of the version that is replaced where it is, untouched, as a file of the new one, too."""
        assert self._over is not None
        self._files[name] = dict(self._over.files[name])
        self._kept.add(name)

    def tree(self, name: str) -> Path:
        """A folder to fill with loose files, published as a whole. The manifest does not list its files."""
        self._trees.append(name)
        path = self.path(name)
        path.mkdir()
        return path

    def publish(self) -> dict[str, dict[str, Any]]:
        """Move all files to their final names, in the order of creation, replacing older ones; for files of no shard.

        Returns size and sha256 of each file.
        """
        self._publish_trees()
        for name in self._files:
            self._folder.publish(self._scratch / name, name)
        return self._files

    def _publish_trees(self) -> None:
        for name in self._trees:
            self._folder.publish_tree(self._scratch / name, name)

    def commit(
        self, *, rows: Mapping[str, int], input_info: Mapping[str, Any], stats: Mapping[str, Any] | None = None
    ) -> ShardRecord:
        """Publish the shard. ``rows``: row counts by status; ``input_info`` needs a ``digest``. Returns the record that
        stands, in a store perhaps another writer's. Raises ClaimLost if the shard now belongs to another worker."""
        current = {str(file["sha256"]) for file in self._files.values()}
        if replaces := [digest for digest in self._replaces if digest not in current]:
            stats = {**(stats or {}), REPLACES: replaces}
        record = ShardRecord(
            shard=self.shard,
            rows=dict(sorted(rows.items())),
            files=self._files,
            input=dict(input_info),
            fingerprint=self._fingerprint,
            stats=dict(stats or {}),
        )
        files = {name: self._scratch / name for name in self._files if name not in self._kept}
        with holding(self._folder, self._claim):
            self._publish_trees()
            return publish(self._folder, self._generation, files, record, self._started, self._over)

    def __enter__(self) -> FileTransaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        clear(self._scratch if self._claim is None else self._scratch.parent)


def _compare(actual: str, expected: str, where: str) -> None:
    if actual != expected:
        text = f"{where}: its bytes are not those its manifest lists; `capipe verify` says what is wrong"
        raise DamagedShard(text)
