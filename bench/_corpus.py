"""Rendered images in tar shards, as other tools write them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from capipe.manifests.files.tar import TarWriter
from capipe.models.tiny.world.corpus import samples


def rendered_shards(folder: Path, shards: int, per_shard: int, seed: int = 5) -> Path:
    """``shards`` tars of ``per_shard`` held-out scenes each; returns the folder."""
    folder.mkdir(parents=True)
    stream = samples(shards * per_shard, "heldout", seed)
    for number in range(shards):
        with (folder / f"{number:05}.tar").open("wb") as file:
            writer = TarWriter(file)
            for sample in islice(stream, per_shard):
                writer.add(f"{sample.key}.jpg", sample.image)
                writer.add(f"{sample.key}.txt", sample.caption.encode())
            writer.finish()
    return folder
