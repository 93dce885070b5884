"""LLaVA's files: a list of conversations as one JSON file, and the images beside it under ``images/``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from ..manifests.artifact import Artifact
from ..manifests.file_transaction import FileTransaction
from ..manifests.manifest import ShardRecord
from .export_source import PARTS, Pair, pairs

CONVERSATIONS = "llava.json"
IMAGES = "images"

#: What a person might say to get a caption. Which one a pair gets depends on its image's uid alone.
WORDINGS = (
    "Describe this picture in detail.",
    "Put what you see here into words.",
    "Write a caption for this image that leaves nothing out.",
    "What can be seen in this picture? Tell all of it.",
    "Tell someone who cannot see this image what is in it.",
    "Give a full account of this picture.",
    "What does this image show?",
    "Say what is here, what it looks like and where it is.",
)

_MARK = "<image>"  # trainers put an image wherever they read this, in answers too


def part_file(shard: str) -> str:
    """A shard's conversations, one a line, until they are put together."""
    return f"{PARTS}/{shard}.jsonl"


def wording(uid: str) -> str:
    """The instruction for an image: the same one in every export."""
    return WORDINGS[int(uid[:8], 16) % len(WORDINGS)]


def conversation(pair: Pair, image: str) -> dict[str, Any]:
    """LLaVA's record of one pair. ``<image>`` in a caption becomes ``[image]``, or trainers would look for a second."""
    return {
        "id": pair.row["key"],
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{_MARK}\n{wording(pair.row['uid'])}"},
            {"from": "gpt", "value": pair.caption.replace(_MARK, "[image]")},
        ],
    }


def write_images(source: Artifact, record: ShardRecord, out: FileTransaction) -> dict[str, Any]:
    """The shard's images as files and its conversations as lines.

    Returns counts: samples, pairs left out because their caption is empty (there is no answer to learn), and captions
    that held ``<image>``.
    """
    folder = f"{IMAGES}/{record.shard}"
    tree, samples, empty, marked = out.tree(folder), 0, 0, 0
    with out.writing(part_file(record.shard)) as file:
        for pair in pairs(source, record, out):
            if not pair.caption.strip():
                empty += 1
                continue
            name = f"{pair.row['key']}.{pair.extension}"
            path = tree / name
            if "/" in name:  # a key that another tool gave; reading its tar refused those that climb out
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pair.image)
            line = json.dumps(conversation(pair, f"{folder}/{name}"), ensure_ascii=False)
            file.write(line.encode() + b"\n")
            samples, marked = samples + 1, marked + (_MARK in pair.caption)
    return {"samples": samples, "without_caption": empty, "image_marks": marked}


def as_list(parts: Iterable[BinaryIO]) -> Iterator[bytes]:
    """The lines of all parts as pieces of one JSON list; no more than a line is in memory."""
    before = b"[\n"
    for part in parts:
        for line in part:
            yield before + line.rstrip(b"\n")
            before = b",\n"
    yield (b"\n]\n" if before == b",\n" else b"[]\n")
