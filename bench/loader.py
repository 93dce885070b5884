"""Images/s of `capipe.open_dataset` ÷ plain webdataset on the same tars.

Both read the same local tars with the same number of torch DataLoader workers, a shuffle buffer of the same size, and
decode JPEGs by Pillow to RGB. Plain webdataset takes image and caption as they are in the tars. Ours joins a caption
artifact and a score artifact, keeps by a condition that is true of every row, chooses between two captions by weight,
compares every image with its uid, and could be resumed: what it adds is part of its time.

A side is a process of its own; the time is that of one epoch, from the start of the workers to the last batch. To open
the data set, imports included, is apart (`open_cpu_s`). `cpu` figures are images per core-second of the process and its
workers, which a busy machine changes less.

    python bench/loader.py [--images 2000] [--side 512] [--workers 2] [--rounds 3] [--keep FOLDER]

2,000 images take some 60 core-seconds in all.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import webdataset
from _common import alternate, quotient, report, version
from PIL import Image
from torch.utils.data import DataLoader

from capipe import open_dataset
from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, INGEST, SCORE
from capipe.manifests.shards import Row, RowReader, expand, uid_of
from capipe.manifests.sidecars import encode_meta

SHARD = 500  # images of a tar
DISTINCT = 50  # pictures; the others repeat them with other bytes at the end, which decoders ignore
BUFFER, BATCH = 1000, 32
CAPTION = "A photograph of a street with people in front of a shop on a sunny day in spring."


def main() -> None:
    options = _options()
    if options.only:
        print(json.dumps(measured(options.only, options.keep, options.workers)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        if not (folder / "scores/_capipe/config.json").exists():
            build(folder, options.images, options.side)
        cpu: dict[str, list[float]] = {"capipe": [], "webdataset": []}
        opening: dict[str, list[float]] = {"capipe": [], "webdataset": []}

        def side(name: str) -> float:
            command = [sys.executable, __file__, "--only", name, "--keep", str(folder)]
            command += ["--workers", str(options.workers)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            if found["images"] != options.images:
                sys.exit(f"{name} gave {found['images']} of {options.images} images")
            cpu[name].append(found["images"] / found["cpu"])
            opening[name].append(found["open"])
            return float(found["images"] / found["wall"])

        sides = {name: lambda number, name=name: side(name) for name in cpu}
        figures = alternate(sides, options.rounds)
    report(
        "loader",
        {**figures, **{f"{name}_cpu": values for name, values in cpu.items()}},
        {name: version(name) for name in ("torch", "webdataset", "pyarrow", "pillow")},
        unit="images/s",
        images=options.images,
        side=options.side,
        workers=options.workers,
        open_cpu_s={name: round(median(values), 2) for name, values in opening.items()},
        ratio=quotient(figures["capipe"], figures["webdataset"]),
        ratio_cpu=quotient(cpu["capipe"], cpu["webdataset"]),
    )


def _options() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512, help="pixels of an image's longer side")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader workers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder to make the artifacts in, or to find them in")
    parser.add_argument("--only", choices=["capipe", "webdataset"], help=argparse.SUPPRESS)
    return parser.parse_args()


# --- data -------------------------------------------------------------------------------------------------------------


def build(folder: Path, images: int, side: int) -> None:
    """Tars as `capipe ingest` writes them, captions of one prompt, and scores."""
    pictures = [picture(number, side) for number in range(DISTINCT)]
    shards = Artifact.create(str(folder / "shards"), "ingest", {"bench": images, "side": side}, {})
    for number, first in enumerate(range(0, images, SHARD)):
        count = min(SHARD, images - first)
        with shards.begin(f"{number:05d}", INGEST, tar=True) as out:
            for row in range(first, first + count):
                image = pictures[row % DISTINCT] + row.to_bytes(8, "big")
                key, uid, text = f"{number:05d}{row - first:05d}", uid_of(image), CAPTION[: 20 + row % 40]
                facts = {"uid": uid, "width": side, "height": side * 3 // 4, "source": f"crawl/{row}.jpg"}
                listed = {"key": key, "status": "ok", "format": "jpg", "text": text, **facts}
                out.write(listed, {"jpg": image, "txt": text.encode(), "json": encode_meta({}, facts)})
            out.commit(rows_in=count, input_info={"digest": str(number)})
    shards.close()
    prompts = [{"name": "dense", "text": "Describe it."}]
    write(folder, "captions", "annotate", {"annotate": {"prompts": prompts}}, ANNOTATE)
    write(folder, "scores", "score", {"bench": images}, SCORE)


def picture(number: int, side: int) -> bytes:
    """A JPEG with the size of a web image of this many pixels."""
    rng = np.random.default_rng(number)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    image = np.asarray(smooth.resize((side, side * 3 // 4), Image.Resampling.BICUBIC), dtype=np.int16)
    grained = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(grained).save(out, "JPEG", quality=85)
    return out.getvalue()


def write(folder: Path, name: str, stage: str, semantic: dict[str, Any], schema: Any) -> None:
    """An artifact with a row for each row of the shards."""
    artifact = Artifact.create(str(folder / name), stage, semantic, {})
    for shard in expand(str(folder / "shards")):
        reader = RowReader(shard)
        rows = [_row(row, stage) for row in reader]
        with artifact.begin(shard.name, schema) as out:
            for row in rows:
                out.write(row)
            out.commit(rows_in=len(rows), input_info=reader.info)
    artifact.close()


def _row(row: Row, stage: str) -> dict[str, Any]:
    text, base = f"{CAPTION} {CAPTION} It is image {row.key}.", {"key": row.key, "uid": row.uid, "status": "ok"}
    if stage == "annotate":
        caption = {"name": "dense", "text": text, "model": "m", "status": "ok", "n_tokens": 40, "attempts": 1}
        return {**base, "text": row.text, "captions": [caption]}
    return {**base, "re_caption": text, "org_caption": row.text, "re_length": 40, "re_clip_score": 0.3}


# --- sides ------------------------------------------------------------------------------------------------------------


def measured(name: str, folder: Path, workers: int) -> dict[str, float]:
    """Images of one epoch, its seconds, core-seconds of this process and its workers, and those to open it."""
    opening = _cpu()
    dataset = ours(folder) if name == "capipe" else plain(folder)
    loader: Iterable[Any] = DataLoader(dataset, BATCH, num_workers=workers, collate_fn=list)
    before, started = _cpu(), time.perf_counter()
    images = sum(len(batch) for batch in loader)
    wall, cpu = time.perf_counter() - started, _cpu() - before
    return {"images": images, "wall": wall, "cpu": cpu, "open": before - opening}


def ours(folder: Path) -> Any:
    return open_dataset(
        folder / "shards",
        captions=folder / "captions",
        scores=folder / "scores",
        where="clip_score > 0.28",
        mix={"dense": 0.7, "org": 0.3},
        decode="pil",
        shuffle=BUFFER,
    )


def plain(folder: Path) -> Any:
    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    return webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(BUFFER).decode("pil")


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


if __name__ == "__main__":
    main()
