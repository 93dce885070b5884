"""`capipe ingest` against img2dataset, resharding the same local JPEGs (DESIGN §9: ratio >= 2).

Both get the same Parquet of files and captions, two processes, shards of the same size, and must write every image with
its sha256. Both decode every image in full: img2dataset with OpenCV at full size, capipe with the DCT scaled down.
img2dataset has its fastest options: no resize, no re-encoding, no EXIF, no monitoring. Times are of the whole command,
start-up included; for `without_startup` and CPU time, each side's time for two images is subtracted.

    python bench/stages/ingest.py [--images 3000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import PEERS, alternate, capipe_command, peer_python, quotient, report, run_timed, version

SHARD_SIZE = 250
PROCESSES = 2
FEW = 2  # images, to measure start-up
THREADS = 4  # of img2dataset per process; 16, 64 and its default 256 are slower on local files and two cores
SIZES = ((640, 480), (800, 600), (1024, 768), (768, 1024))


def noise_photo(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Smooth noise at several scales: compresses like a photograph (1024x768 at quality 90: about 180 kB)."""
    total = np.full((height, width, 3), 128, np.float32)
    for scale, weight in ((4, 12), (16, 25), (64, 45)):
        coarse = rng.normal(0, weight, (height // scale, width // scale, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(layer)
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def make_corpus(folder: Path, count: int) -> Path:
    """``count`` different JPEGs and the Parquet that lists them: crops of a few large images."""
    rng = np.random.default_rng(0)
    pictures = [noise_photo(2048, 1536, rng) for _ in range(6)]
    rows = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        picture = pictures[number % len(pictures)]
        left, top = int(rng.integers(2048 - width)), int(rng.integers(1536 - height))
        encoded = io.BytesIO()
        picture.crop((left, top, left + width, top + height)).save(encoded, "JPEG", quality=int(rng.integers(80, 93)))
        path = folder / f"{number:06d}.jpg"
        path.write_bytes(encoded.getvalue())
        rows.append({"path": str(path), "url": path.as_uri(), "caption": f"picture number {number}"})
    table = folder / "list.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    pq.write_table(pa.Table.from_pylist(rows[:FEW]), folder / "few.parquet")
    return table


def capipe(table: Path, out: Path) -> list[str]:
    options = ["--out", str(out), "--shard-size", str(SHARD_SIZE), "--workers", str(PROCESSES)]
    return [capipe_command(), "ingest", str(table), *options]


def img2dataset(table: Path, out: Path) -> list[str]:
    options = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": out,
        "output_format": "webdataset",
        "processes_count": PROCESSES,
        "thread_count": THREADS,
        "number_sample_per_shard": SHARD_SIZE,
        "resize_mode": "no",
        "skip_reencode": True,
        "extract_exif": False,
        "compute_hash": "sha256",
        "enable_wandb": False,
    }
    return [str(PEERS / "img2dataset"), *(f"--{name}={value}" for name, value in options.items())]


def images_in(out: Path) -> int:
    """Number of image members in all tars of a folder."""
    count = 0
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            count += sum(name.endswith(".jpg") for name in tar.getnames())
    return count


class Side:
    """One of the two sides: runs its command on a table, checks that every image was written, collects CPU times."""

    def __init__(self, command: Callable[[Path, Path], list[str]], table: Path, images: int, log: Path) -> None:
        self._command, self._table, self._images, self._log = command, table, images, log
        self.cpu: list[float] = []

    def __call__(self, number: int) -> float:
        out = self._log.parent / f"out-{self._command.__name__}"
        timing = run_timed(self._command(self._table, out), self._log, NO_ALBUMENTATIONS_UPDATE="1")
        if images_in(out) != self._images:
            sys.exit(f"{self._command.__name__} wrote {images_in(out)} of {self._images} images")
        shutil.rmtree(out)
        self.cpu.append(timing.cpu)
        return timing.wall


def sides(table: Path, images: int) -> dict[str, Side]:
    return {side.__name__: Side(side, table, images, table.parent / "commands.log") for side in (capipe, img2dataset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    peer = version("img2dataset", peer_python())
    with tempfile.TemporaryDirectory(prefix="capipe-bench-") as name:
        table = make_corpus(Path(name), options.images)
        few, all_of = sides(table.with_name("few.parquet"), FEW), sides(table, options.images)
        startup = {name: median(values) for name, values in alternate(few, 2).items()}
        seconds = alternate(all_of, options.rounds)
    rates = {name: [options.images / value for value in values] for name, values in seconds.items()}
    steady = {name: options.images / (median(values) - startup[name]) for name, values in seconds.items()}
    cpu = {name: 1000 * (median(all_of[name].cpu) - median(few[name].cpu)) / options.images for name in seconds}
    report(
        "ingest",
        rates,
        {"capipe": version("capipe"), "pillow": version("pillow"), "img2dataset": peer},
        ratio=quotient(rates["capipe"], rates["img2dataset"]),
        unit="images/s",
        images=options.images,
        startup_seconds={name: round(value, 2) for name, value in startup.items()},
        without_startup={name: round(value, 1) for name, value in steady.items()},
        cpu_ms_per_image={name: round(value, 2) for name, value in cpu.items()},
    )


if __name__ == "__main__":
    main()
