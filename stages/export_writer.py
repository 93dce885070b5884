"""What writes the pairs of one shard into the files of a format; and what formats of loose images have in common."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from ..manifests.file_transaction import FileTransaction
from .export_source import PARTS, Pair

IMAGES = "images"
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')  # in a file's name, on one system or another
_LONGEST = 160  # bytes of a file's name, with room for endings


class ShardWriter(ABC):
    """Context manager: ``add`` pairs in order, ``finish`` once; leaving before that gives up what is open."""

    def __init__(self, out: FileTransaction, shard: str) -> None:
        self.out, self.shard, self.open = out, shard, ExitStack()

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
    """

    def __init__(self, out: FileTransaction, shard: str) -> None:
        super().__init__(out, shard)
        self.folder = f"{IMAGES}/{shard}"
        self.counts: Counter[str] = Counter(samples=0)
        self._tree, self._names = out.tree(self.folder), set[str]()
        self._lines = self.open.enter_context(out.writing(part_file(shard)))

    def write(self, name: str, data: bytes) -> str:
        """A file of the shard's folder; returns its path from the export's."""
        path = self._tree / name
        if "/" in name:  # a key that another tool gave; reading its tar refused those that climb out
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"{self.folder}/{name}"

    def line(self, entry: dict[str, Any]) -> None:
        self._lines.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self.counts["samples"] += 1

    def safe_name(self, key: str) -> str:
        """A name without ending for a key's files: one that every file system takes, and no other of the folder has,
        whether it tells small letters from large or not. Most keys are such names."""
        name = safe = short(_UNSAFE.sub("_", key).strip(" .") or "image", _LONGEST)
        number = 1
        while name.casefold() in self._names:
            number += 1
            name = f"{safe}~{number}"
        self._names.add(name.casefold())
        return name

    def finish(self) -> dict[str, Any]:
        self.open.close()
        return dict(self.counts)


def part_file(shard: str) -> str:
    """A shard's lines, until they are put together."""
    return f"{PARTS}/{shard}.jsonl"


def short(text: str, size: int) -> str:
    """``text`` cut to ``size`` bytes of UTF-8, between two characters."""
    return text.encode()[:size].decode(errors="ignore")
