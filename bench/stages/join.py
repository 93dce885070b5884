"""A table of N uids joined with the rows of as many images: sorted arrays against a dictionary of Python's.

Both sides read the same Parquet (uid and three numbers of 32 bits, rows in random order), find the rows of one shard
after another, and add up what they found; the sums must be equal. Each is a process of its own. ``bytes_per_row``: of
peak memory above that of a process with the same imports and a table of one row, so reading and sorting are in it.
``ratio``: the dictionary's bytes ÷ those of the arrays.

    python bench/stages/join.py [--rows 200000]

A million rows (``--rows 1000000``) take some ten core-seconds in all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import report, version

COLUMNS = ("a", "b", "c")
_BATCH = 1 << 16

_PARTS = """
import sys, time
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from capipe.manifests.joining.table import open_table, read_table
place, images, side = sys.argv[1:]
started = time.process_time()
total, found = 0.0, 0
"""
_SIDES = {
    "arrays": """
table = open_table(place)
read = read_table(table, list(table.columns))
for batch in pq.ParquetFile(images).iter_batches(10_000, columns=["key", "uid"], use_threads=False):
    places = read.places("0", batch.column("key"), batch.column("uid"))
    found += int((places >= 0).sum())
    for name in table.columns:
        total += float(np.nansum(read.values(name, places).to_numpy(zero_copy_only=False).astype(np.float64)))
""",
    "dictionary": """
known = {}
for batch in pq.ParquetFile(place).iter_batches(1 << 16, use_threads=False):
    for row in batch.to_pylist():
        uid = row.pop("uid")
        known[uid] = tuple(row.values())
for batch in pq.ParquetFile(images).iter_batches(10_000, columns=["uid"], use_threads=False):
    for uid in batch.column("uid").to_pylist():
        values = known.get(uid)
        if values is not None:
            found += 1
            total += sum(values)
""",
}
_END = """
# of this program alone: ru_maxrss is at least that of the process that started it
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"{peak} {time.process_time() - started:.3f} {found} {total:.6g}")
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        large, one, images = (Path(scratch) / f"{name}.parquet" for name in ("large", "one", "images"))
        uids = build(large, options.rows)
        build(one, 1)
        write_images(images, uids)
        answers = {
            name: [_run(code, large, images, name) for _ in range(options.rounds)] for name, code in _SIDES.items()
        }
        empty = {name: _run(code, one, images, name)[0] for name, code in _SIDES.items()}
    agree = len({(found, total) for runs in answers.values() for _, _, found, total in runs}) == 1
    bytes_per_row = {
        name: round((min(run[0] for run in runs) - empty[name]) / options.rows, 1) for name, runs in answers.items()
    }
    report(
        "join",
        {f"{name}_cpu_s": [run[1] for run in runs] for name, runs in answers.items()},
        {name: version(name) for name in ("pyarrow", "numpy")},
        rows=options.rows,
        columns=len(COLUMNS),
        found=int(answers["arrays"][0][2]),
        agree=agree,
        bytes_per_row=bytes_per_row,
        ratio=round(bytes_per_row["dictionary"] / max(1.0, bytes_per_row["arrays"]), 2),
    )


def build(path: Path, rows: int) -> list[str]:
    """A table of ``rows``; returns its uids."""
    rng = np.random.default_rng(rows)
    uids = [data.hex() for data in np.frombuffer(rng.bytes(16 * rows), "V16").tolist()]
    with pq.ParquetWriter(path, pa.schema([("uid", pa.string()), *((name, pa.float32()) for name in COLUMNS)])) as file:
        for start in range(0, rows, _BATCH):
            own = uids[start : start + _BATCH]
            values = {name: rng.random(len(own), np.float32) for name in COLUMNS}
            file.write_table(pa.table({"uid": own, **values}, schema=file.schema))
    return uids


def write_images(path: Path, uids: list[str]) -> None:
    """Keys and uids of as many images, in another order; the table has nine in ten of them."""
    rng = np.random.default_rng(1)
    order = rng.permutation(len(uids))
    shown = [uids[at] if number % 10 else rng.bytes(16).hex() for number, at in enumerate(order.tolist())]
    keys = [f"{number:09d}" for number in range(len(shown))]
    pq.write_table(pa.table({"key": keys, "uid": shown}), path, row_group_size=10_000)


def _run(code: str, table: Path, images: Path, side: str) -> tuple[float, float, str, str]:
    """Peak bytes, core-seconds, and what was found, of a side in a process of its own."""
    command = [sys.executable, "-c", _PARTS + code + _END, str(table), str(images), side]
    done: Any = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{side} ended with {done.returncode}: {done.stderr[-300:]}")
    peak, seconds, found, total = done.stdout.split()
    return float(peak), float(seconds), found, total


if __name__ == "__main__":
    main()
