"""Conversation formats with image files under ``images/``: LLaVA's JSON list, and chat messages as JSON lines."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from ...manifests.file_transaction import FileTransaction
from ...manifests.files.names import file_name
from .source import Pair
from .writer import IMAGES, LooseWriter

CONVERSATIONS, MESSAGES, DATASET_INFO = "llava.json", "messages.jsonl", "dataset_info.json"

#: User turns that ask for a caption; the choice depends on the image's uid alone.
INSTRUCTIONS = (
    "Describe this picture in detail.",
    "Put what you see here into words.",
    "Write a caption for this image that leaves nothing out.",
    "What can be seen in this picture? Tell all of it.",
    "Tell someone who cannot see this image what is in it.",
    "Give a full account of this picture.",
    "What does this image show?",
    "Say what is here, what it looks like and where it is.",
)

MARK = "<image>"  # image placeholder: trainers replace it wherever it occurs, also in answers


def instruction(uid: str) -> str:
    """The instruction for an image, the same in every export."""
    return INSTRUCTIONS[int(uid[:8], 16) % len(INSTRUCTIONS)]


class Conversations(LooseWriter):
    """Instruction-caption conversations. ``<image>`` in a caption becomes ``[image]``, or trainers would expect another
    image.

    Counts pairs omitted for an empty caption (no answer to learn), and captions with ``<image>``.
    """

    def __init__(self, out: FileTransaction, shard: str) -> None:
        super().__init__(out, shard)
        self.counts.update(without_caption=0, image_marks=0)

    def add(self, pair: Pair) -> None:
        if not pair.caption.strip():
            self.counts["without_caption"] += 1
            return
        self.counts["image_marks"] += MARK in pair.caption
        path = self.write(f"{self.name(pair)}.{file_name(pair.extension)}", pair.image)
        self.line(
            self.entry(pair, path, f"{MARK}\n{instruction(pair.row['uid'])}", pair.caption.replace(MARK, "[image]"))
        )

    @abstractmethod
    def name(self, pair: Pair) -> str:
        """File name of the image, without extension."""

    @abstractmethod
    def entry(self, pair: Pair, image: str, question: str, answer: str) -> dict[str, Any]: ...


class LlavaWriter(Conversations):
    """LLaVA's JSON records."""

    extras = (CONVERSATIONS, IMAGES)
    listed = CONVERSATIONS
    data_files = CONVERSATIONS
    loading = """\
`--data_path llava.json --image_folder .` in LLaVA's training scripts; with `datasets`, the conversations alone:

```python
import datasets

datasets.load_dataset("path/of/this/folder", split="train")
```"""

    @staticmethod
    def joined(parts: Iterable[BinaryIO]) -> Iterator[bytes]:
        return as_list(parts)

    def name(self, pair: Pair) -> str:
        return self.safe_path(pair.row["key"])

    def entry(self, pair: Pair, image: str, question: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": pair.row["key"], "image": image, "conversations": turns}


class MessagesWriter(Conversations):
    """Chat messages with image paths, as read by LLaMA-Factory and TRL."""

    extras = (MESSAGES, DATASET_INFO, IMAGES)
    listed = MESSAGES
    data_files = MESSAGES
    loading = """\
LLaMA-Factory: `dataset_dir: path/of/this/folder` and `dataset: captions` in its
configuration. With `datasets`, messages and paths of images:

```python
import datasets

datasets.load_dataset("path/of/this/folder", split="train")
```"""

    def name(self, pair: Pair) -> str:
        return self.safe_name(pair.row["key"])

    def entry(self, pair: Pair, image: str, question: str, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"id": pair.row["key"], "messages": turns, "images": [image]}


def dataset_info() -> bytes:
    """LLaMA-Factory's entry for the messages: ``--dataset_dir OUT --dataset captions``."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    captions = {"file_name": MESSAGES, "formatting": "sharegpt", "columns": columns, "tags": tags}
    return json.dumps({"captions": captions}, indent=1).encode()


def as_list(parts: Iterable[BinaryIO]) -> Iterator[bytes]:
    """The lines of all parts as chunks of one JSON list, with one line in memory at a time."""
    before = b"[\n"
    for part in parts:
        for line in part:
            yield before + line.rstrip(b"\n")
            before = b",\n"
    yield (b"\n]\n" if before == b",\n" else b"[]\n")
