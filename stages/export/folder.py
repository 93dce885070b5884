"""Image files with caption files: ``NAME.jpg`` and ``NAME.txt``, and ``metadata.jsonl`` for `datasets`."""

from __future__ import annotations

from typing import Any

from ...manifests.file_transaction import FileTransaction
from ...manifests.files.names import file_name
from .source import Pair
from .writer import IMAGES, LooseWriter

METADATA = "metadata.jsonl"  # file name expected by the ImageFolder loader of `datasets`


class FolderWriter(LooseWriter):
    """Folder format. Counts images by extension, empty captions, and multi-line ones (some trainers read one line)."""

    extras = (METADATA, IMAGES)
    listed = METADATA
    loading = """\
```python
import datasets

datasets.load_dataset("path/of/this/folder", split="train")  # or its name on the Hub: image, text, key, uid
```

Each picture's caption lies beside it as well (`images/00000/NAME.jpg`, `NAME.txt`), as trainers of image models take
them."""

    def __init__(self, out: FileTransaction, shard: str) -> None:
        super().__init__(out, shard)
        self._images: dict[str, int] = {}

    def add(self, pair: Pair) -> None:
        name = self.safe_name(pair.row["key"])
        path = self.write(f"{name}.{file_name(pair.extension)}", pair.image)
        self.write(f"{name}.txt", pair.caption.encode())
        self.line({"file_name": path, "text": pair.caption, "key": pair.row["key"], "uid": pair.row["uid"]})
        self._images[pair.extension] = self._images.get(pair.extension, 0) + 1
        self.counts["empty_captions"] += not pair.caption.strip()
        self.counts["several_lines"] += len(pair.caption.strip().splitlines()) > 1

    def finish(self) -> dict[str, Any]:
        return {**super().finish(), "images": dict(sorted(self._images.items()))}
