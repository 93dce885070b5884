"""What writes the pairs of one shard into the files of a format; and what formats of loose images have in common."""

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
from ...manifests.files.names import file_name, same_file
from ...manifests.files.storage import create
from .source import PARTS, Pair

IMAGES = "images"
_LONGEST_FOLDER = 600  # characters: longer ones would make names that are none


class ShardWriter(ABC):
    """Context manager: ``add`` pairs in order, ``finish`` once; leaving before that gives up what is open.

    ``extras``: files and folders of an export beside its shards' and its card; `--fresh` removes them. ``data_files``:
    what `datasets` reads, a pattern, empty for nothing. ``loading``: the card's words on reading it, in Markdown.
    """

    extras: ClassVar[tuple[str, ...]] = ()
    data_files: ClassVar[str] = ""
    loading: ClassVar[str] = ""

    def __init__(self, out: FileTransaction, shard: str) -> None:
        self.out, self.shard, self.open = out, shard, ExitStack()

    @classmethod
    def for_shard(cls, out: FileTransaction, shard: str, rows: pa.Schema, extension: str | None) -> ShardWriter:
        """``rows``: the schema of the shard's listing; ``extension``: how all images are to be called, if alike."""
        return cls(out, shard)

    @abstractmethod
    def add(self, pair: Pair) -> None: ...

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Complete all files; returns what the manifest says of the shard, ``samples`` at least."""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.open.__exit__(kind, error, tb)


class LooseWriter(ShardWriter):
    """Images as files in a folder of the shard's, and a line about each that is put together with other shards' later.

    The folder appears whole, before the shard is declared. Counts: ``samples``, and what formats count beside.
    ``listed``: the file that all shards' lines become, put together by ``joined``.
    """

    listed: ClassVar[str]

    @staticmethod
    def joined(parts: Iterable[BinaryIO]) -> Iterator[bytes]:
        """The contents of ``listed``, made of the shards' lines."""
        return chain.from_iterable(parts)

    def __init__(self, out: FileTransaction, shard: str) -> None:
        super().__init__(out, shard)
        self.folder = f"{IMAGES}/{shard}"
        self.counts: Counter[str] = Counter(samples=0)
        self._tree, self._names = out.tree(self.folder), defaultdict[str, set[str]](set)  # of files, by folder
        self._lines = self.open.enter_context(out.writing(part_file(shard)))

    def write(self, name: str, data: bytes) -> str:
        """A file of the shard's folder; returns its path from the export's."""
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
        """A name without ending for a key's files, as :func:`file_name` makes it; no other of the folder has it."""
        return self._new_name("", key)

    def safe_path(self, key: str) -> str:
        """The same, where a key with slashes, which another tool gave, is a file in folders."""
        *folders, last = key.split("/")
        folder = "".join(f"{file_name(each)}/" for each in folders)
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
    """A shard's lines, until they are put together."""
    return f"{PARTS}/{shard}.jsonl"
