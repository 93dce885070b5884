"""Cost of the grouping pass of `capipe dedup` at 100,000 and 1,000,000 images, extrapolated to 5 M and 1 B.

Measured: the search for near hashes (two per image), the groups and their keepers, each size in its own process; a
tenth of the images have a copy three bits away. Also measured: candidate pairs confirmed per second by their
signatures, and images hashed per second by the first pass with one process.

Extrapolation: the search compares each hash with those that share a band of 16 bits (or all but one bit of it), so its
time grows with the square of the number of images, its memory linearly. Hashes of real images are less evenly spread
than these; flat and bright ones crowd into few bands, so the extrapolated seconds are a lower bound.
On the 2-core machine of docs/benchmarks.md, one thread: 1.2 s and 0.13 GiB for 100,000 images, 63 s and 0.4 GiB for a
million; so half an hour and 2 GiB for 5 million. A billion in one piece would take 17,000 hours and 400 GiB: there,
run it per part of a set (200 parts of 5 million: 90 hours on one core, copies across parts unseen).

    python bench/dedup.py [--sizes 100000 1000000] [--rounds 1] [--embeddings 100000 400000]
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, report, version

from capipe.models.images.decode import ImageLimits, Thumbnail, thumbnail
from capipe.models.tiny.world.corpus import samples
from capipe.stages.dedup.confirm import same_picture
from capipe.stages.dedup.cosine import near_vectors
from capipe.stages.dedup.groups import Contents, candidates, connected, keepers, lookalikes
from capipe.stages.dedup.marks import DedupConfig
from capipe.stages.dedup.perceptual_hash import DECODED_SIDE, SIGNATURE_BYTES, looks


def grouped(count: int) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak MiB of grouping ``count`` images in this process; pairs and repeats found."""
    rng = np.random.default_rng(0)
    phash, inner = (rng.integers(0, 1 << 64, count, dtype=np.uint64) for _ in range(2))
    planted = count // 10
    phash[-planted:] = phash[:planted] ^ np.uint64(0x0001_0000_8000_0100)
    uids = np.sort(rng.integers(0, 256, (count, 16), dtype=np.uint8).view("S16").ravel())
    contents = Contents(uids, rng.integers(1, 10**7, count), phash, inner, phash)
    started, busy = time.perf_counter(), time.process_time()
    first = np.unique(lookalikes(contents))
    i, j = candidates(contents.take(first), DedupConfig().radius)
    kept = keepers(contents, connected(count, first[i], first[j]))
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    repeats = int((kept != np.arange(count)).sum())
    if repeats < planted:
        sys.exit(f"of {planted} planted copies only {repeats} were found")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu_seconds": busy, "peak_mib": peak, "pairs": len(i), "repeats": repeats}


def confirmed_per_second(count: int = 256) -> float:
    """Candidate pairs that one thread confirms per second, all of the expensive kind that is aligned first."""
    pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples(count, "heldout", 3, size=256)]
    cropped = [picture.crop((5, 5, 251, 251)) for picture in pictures]
    left, right = (
        np.stack([np.frombuffer(looks(image).signature, dtype=np.uint8) for image in side])
        for side in (pictures, cropped)
    )
    started = time.process_time()
    share = same_picture(left, right).mean()
    seconds = time.process_time() - started
    if share < 0.9:
        sys.exit(f"of the cropped copies only {share:.2f} were found")
    return count / seconds


def embedded(count: int, width: int = 512) -> dict[str, float]:
    """CPU seconds of finding near embeddings among ``count``, a tenth of them planted, and the share found."""
    rng = np.random.default_rng(0)
    planted = count // 10
    vectors = rng.standard_normal((count, width), dtype=np.float32).astype(np.float16)
    vectors[-planted:] = vectors[:planted] + 0.2 * rng.standard_normal((planted, width), dtype=np.float32)
    started = time.process_time()
    left, right = (np.concatenate(chunks) for chunks in zip(*near_vectors(vectors, 0.96), strict=True))
    seconds = time.process_time() - started
    groups = connected(count, left, right)
    share = float((groups[-planted:] == groups[:planted]).mean())
    return {"vectors": count, "cpu_seconds": round(seconds, 1), "found": round(share, 4)}


def looked_at_per_second(count: int = 200, size: int = 512) -> float:
    """Images of ``size`` pixels a side that one process hashes per second."""
    images = [sample.image for sample in samples(count, "heldout", 3, size=size)]
    started = time.process_time()
    for data in images:
        small = thumbnail(data, ImageLimits(), DECODED_SIDE)
        assert isinstance(small, Thumbnail)
        looks(small.image)
    return count / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", type=int, help="group so many in this process and print the figures as JSON")
    parser.add_argument("--embeddings", type=int, nargs="*", default=[], help="so many vectors of 512; needs faiss")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(grouped(options.one)))
        return
    memory: dict[int, float] = {}
    busy: dict[int, float] = {}

    def seconds(size: int) -> float:
        command = [sys.executable, __file__, "--one", str(size)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        memory[size], busy[size] = result["peak_mib"], result["cpu_seconds"]
        return float(result["seconds"])

    figures = alternate({str(size): lambda _, size=size: seconds(size) for size in options.sizes}, options.rounds)
    largest = max(options.sizes)
    took = busy[largest]  # CPU seconds of one thread, without other load on the machine
    extrapolated = {}
    for name, count in (("5M", 5_000_000), ("1B", 1_000_000_000)):
        hours, gib = took * (count / largest) ** 2 / 3600, memory[largest] * count / largest / 1024
        extrapolated[name] = {"hours": round(hours, 2), "gib": round(gib, 1)}
    report(
        "dedup",
        figures,
        {"numpy": version("numpy")},
        unit="s",
        cpu_seconds={str(size): round(seconds, 2) for size, seconds in busy.items()},
        peak_mib={str(size): round(peak) for size, peak in memory.items()},
        extrapolated=extrapolated,
        signature_bytes=SIGNATURE_BYTES,
        pairs_confirmed_per_cpu_second=round(confirmed_per_second()),
        images_hashed_per_cpu_second=round(looked_at_per_second()),
        embeddings=[embedded(count) for count in options.embeddings],
    )


if __name__ == "__main__":
    main()
