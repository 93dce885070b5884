"""Base classes of export formats: writers of one shard's pairs, and of formats with image files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa

from ...manifests.file_transaction import FileTransaction
from ...manifests.files.image_types import COMMON
from ...manifests.files.names import file_name, same_file
from ...manifests.files.storage import create
from .source import PARTS, Pair

IMAGES = "images"
_LONGEST_FOLDER = 600  # characters: longer ones would make invalid paths


class ShardWriter(ABC):
    """Writer of one shard, a context manager: ``add`` pairs in order, ``finish`` once; leaving before that discards.

    ``extras``: files and folders of an export apart from its shards' and its card; `--fresh` removes them.
    ``data_files``: pattern of the files that `datasets` reads, empty for none. ``loading``: the card's section on
    loading, in Markdown. ``images``: image formats that the readers of this one decode.
    """

    extras: ClassVar[tuple[str, ...]] = ()
    data_files: ClassVar[str] = ""
    loading: ClassVar[str] = ""
    images: ClassVar[tuple[str, ...]] = COMMON

    def __init__(self, out: FileTransaction, shard: str) -> None:
        self.out, self.shard, self.open = out, shard, ExitStack()

    @classmethod
    def for_shard(cls, out: FileTransaction, shard: str, rows: pa.Schema, extension: str | None) -> ShardWriter:
        """Writer of a shard. ``rows``: schema of its listing; ``extension``: for all images, if it is to be uniform."""
        return cls(out, shard)

    @classmethod
    def check(cls) -> None:
        """Raise BadInput if the format cannot be written here, as where a package is missing."""
        return

    @abstractmethod
    def add(self, pair: Pair) -> None: ...

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Complete all files; returns the shard's statistics for the manifest, at least ``samples``."""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.open.__exit__(kind, error, tb)


class LooseWriter(ShardWriter):
    """Image files in a folder per shard, and one JSON line per image; all shards' lines are joined later.

    The folder appears atomically, before the shard is committed. Counts: ``samples``, and those of the format.
    ``listed``: the file of all shards' lines, made by ``joined``.
    """

    listed: ClassVar[str]

    @staticmethod
    def joined(parts: Iterable[BinaryIO]) -> Iterator[bytes]:
        """Contents of ``listed`` from the shards' lines."""
        return chain.from_iterable(parts)

    def __init__(self, out: FileTransaction, shard: str) -> None:
        super().__init__(out, shard)
        self.folder = f"{IMAGES}/{shard}"
        self.counts: Counter[str] = Counter(samples=0)
        self._tree, self._names = out.tree(self.folder), defaultdict[str, set[str]](set)  # file names by folder
        self._lines = self.open.enter_context(out.writing(part_file(shard)))

    def write(self, name: str, data: bytes) -> str:
        """Write a file of the shard's folder; returns its path relative to the export."""
        path = self._tree / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        with create(path) as file:
            file.write(data)
        return f"{self.folder}/{name}"

    def line(self, entry: dict[str, Any]) -> None:
        self._lines.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self.counts["samples"] += 1

    def safe_name(self, key: str) -> str:
        """File name for a key, without extension, by :func:`file_name`; unique in the folder."""
        return self._new_name("", key)

    def safe_path(self, key: str) -> str:
        """As :meth:`safe_name`, with subfolders for keys with slashes, as some tools write."""
        *folders, last = key.split("/")
        folder = "".join(f"{file_name(part)}/" for part in folders)
        return self.safe_name(key) if len(folder) > _LONGEST_FOLDER else self._new_name(folder, last)

    def _new_name(self, folder: str, key: str) -> str:
        taken = self._names[same_file(folder)]
        name = file_name(key, taken)
        taken.add(same_file(name))
        return folder + name

    def finish(self) -> dict[str, Any]:
        self.open.close()
        return dict(self.counts)


def part_file(shard: str) -> str:
    """File of a shard's lines, until they are joined."""
    return f"{PARTS}/{shard}.jsonl"
