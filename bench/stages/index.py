"""An index of N rows: `capipe filter --index` on scores of N images, then read back by DuckDB and Polars.

The scores are synthetic, with captions of some 30 words; the tars have their first image, by which they are recognized,
and are sparse files of the recorded sizes: nothing else of them is read. Each step is a process of its own; memory is
the sum over its process tree, sampled every 50 ms. All readers count the selected rows, average a score and count the
captions with a word; their answers must be equal, and equal to what the command reported.

    python bench/stages/index.py [--rows 100000] [--shard 10000] [--keep FOLDER]

A million rows take some 150 core-seconds in all, growing with the rows; ``--rows 10000000 --shard 10000`` is the
size at which memory is to be stated. DuckDB and Polars are in the extra `dev`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import report, version

from capipe.manifests.artifact import Artifact
from capipe.manifests.files.tar import TarWriter
from capipe.manifests.schema import SCORE
from capipe.manifests.shards import uid_of
from capipe.manifests.transaction import ROW_GROUP, shard_stats

IMAGE_BYTES = 250_000  # of a web image; the tars have this size per row
WORDS = 30  # of a caption
KEEP = "clip_score > 0.3"
WORD = "w0042"  # of a vocabulary of 2,000 with Zipf's frequencies

_READERS = {
    "duckdb": """
import duckdb
duckdb.sql("SET enable_progress_bar = false")
sums = f"count(*), avg(re_clip_score), count(*) filter (caption like '%{word}%')"
query = f"select {sums} from read_parquet('{folder}/*.parquet') where status = 'ok'"
print(*duckdb.sql(query).fetchall()[0])
""",
    "polars": """
import polars as pl
kept = pl.scan_parquet(f"{folder}/*.parquet").filter(pl.col("status") == "ok")
with_word = pl.col("caption").str.contains(word, literal=True).sum().alias("with_word")
sums = [pl.len(), pl.col("re_clip_score").cast(pl.Float64).mean(), with_word]
print(*kept.select(sums).collect(engine="streaming").row(0))
""",
    "pyarrow": """
from glob import glob
import pyarrow.compute as pc, pyarrow.dataset as ds
n = total = w = 0
kept = ds.dataset(glob(f"{folder}/*.parquet"), format="parquet")
for batch in kept.to_batches(columns=["re_clip_score", "caption"], filter=pc.field("status") == "ok"):
    n += len(batch)
    total += pc.sum(batch["re_clip_score"].cast("float64")).as_py() or 0
    w += pc.sum(pc.match_substring(batch["caption"], word)).as_py() or 0
print(n, total / n, w)
""",
}


@dataclass(frozen=True)
class Step:
    """``wall`` and ``cpu`` seconds of a process tree, its peak memory in MiB, and its output."""

    wall: float
    cpu: float
    peak: float
    said: str


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        if not (folder / "scores/_capipe/config.json").exists():
            build(folder, options.rows, options.shard)
        steps = {"filter": _filter(folder)}
        index = folder / "out/shards"
        for name, code in _READERS.items():
            head = f"folder, word = {str(index)!r}, {WORD!r}\n"
            steps[name] = run([sys.executable, "-c", head + code])
        answers = {name: _answer(steps[name].said) for name in _READERS}
        kept = Artifact.open(str(index)).config["run"]["kept"]
        agree = all(answer == answers["pyarrow"] for answer in answers.values()) and answers["pyarrow"][0] == kept
        sizes = {
            name: sum(path.stat().st_size for path in place.glob("*.parquet"))
            for name, place in (("index", index), ("scores", folder / "scores"))
        }
    figures = {f"{name}_cpu_s": [step.cpu] for name, step in steps.items()}
    report(
        "index",
        figures,
        {name: version(name) for name in ("duckdb", "polars", "pyarrow")},
        rows=options.rows,
        kept=kept,
        shards=-(-options.rows // options.shard),
        agree=agree,
        peak_mib={name: round(step.peak) for name, step in steps.items()},
        wall_s={name: round(step.wall, 1) for name, step in steps.items()},
        bytes_per_row=round(sizes["index"] / options.rows, 1),
        index_to_scores=round(sizes["index"] / sizes["scores"], 3),
        ratio=round(kept * IMAGE_BYTES / sizes["index"], 1),
    )


def _options() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shard", type=int, default=10_000, help="rows of a shard")
    parser.add_argument("--keep", type=Path, help="folder to make the artifacts in, or to find the scores in")
    return parser.parse_args()


# --- data -------------------------------------------------------------------------------------------------------------


def build(folder: Path, rows: int, size: int) -> None:
    """Sparse tars, and the scores of ``rows`` images in shards of ``size``."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{number:04d}" for number in range(2000)])
    chances = 1 / np.arange(1, 2001)
    edges = np.cumsum(chances / chances.sum())
    total = -(-rows // size)
    scores = Artifact.create(str(folder / "scores"), "score", {"bench": rows}, {"shards_total": total})
    (folder / "tars").mkdir(parents=True, exist_ok=True)
    for number in range(total):
        count, shard = min(size, rows - number * size), f"{number:05d}"
        first = rng.bytes(1000)
        with (folder / f"tars/{shard}.tar").open("wb") as tar:
            TarWriter(tar).add(f"{shard}{0:05d}.jpg", first)
            tar.truncate(count * IMAGE_BYTES)
        words = vocabulary[np.minimum(np.searchsorted(edges, rng.random((count, WORDS))), 1999)]
        columns = {
            "key": [f"{shard}{row:05d}" for row in range(count)],
            "uid": [uid_of(first), *(rng.bytes(16).hex() for _ in range(count - 1))],
            "status": ["ok"] * count,
            "re_caption": [" ".join(row) + "." for row in words],
            "re_length": pa.array([WORDS] * count, pa.int32()),
            "re_sentences": pa.array([1] * count, pa.int32()),
            "re_language": ["en"] * count,
            **{
                f"re_clip_score{part}": rng.normal(0.3, 0.05, count).astype(np.float32)
                for part in ("", "_mean", "_min")
            },
            "org_caption": [" ".join(row[:8]) for row in words],
            "org_clip_score": rng.normal(0.25, 0.05, count).astype(np.float32),
        }
        filled = [pa.array(columns.get(field.name, [None] * count), field.type) for field in SCORE]
        table = pa.table(filled, schema=SCORE)
        with scores.begin_files(shard) as out:
            with out.writing(f"{shard}.parquet") as file:
                pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP)
            with out.writing(f"{shard}_stats.json") as file:
                file.write(shard_stats({"ok": count}))
            out.commit(rows={"ok": count}, input_info={"digest": shard, "bytes": count * IMAGE_BYTES})
    scores.close()


# --- steps ------------------------------------------------------------------------------------------------------------


def _filter(folder: Path) -> Step:
    words = ["filter", "--shards", folder / "tars", "--scores", folder / "scores", "--keep", KEEP, "--index"]
    return run([sys.executable, "-m", "capipe.pipeline", *map(str, words), "--out", str(folder / "out"), "--fresh"])


def run(command: Sequence[str]) -> Step:
    """Run a command to its end. A failure ends the benchmark."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        peak = cpu = 0.0
        while process.poll() is None:
            memory, seconds = _usage(process)
            peak, cpu = max(peak, memory), max(cpu, seconds)
            time.sleep(0.05)
        said.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)[:300]} ended with {process.returncode}: {said.read()[-300:]}")
        return Step(time.perf_counter() - started, cpu, peak / (1 << 20), said.read())


def _usage(process: psutil.Process) -> tuple[float, float]:
    """Resident bytes of a process tree, and its CPU seconds so far, ended children included."""
    memory = seconds = 0.0
    try:
        times = process.cpu_times()
        seconds += times.user + times.system + times.children_user + times.children_system
        for one in [process, *process.children(recursive=True)]:
            memory += one.memory_info().rss
            seconds += sum(one.cpu_times()[:2]) if one.pid != process.pid else 0
    except psutil.NoSuchProcess:
        pass
    return memory, seconds


def _answer(said: str) -> tuple[int, str, int]:
    count, mean, with_word = said.splitlines()[-1].split()  # a library's warnings come before
    return int(count), f"{float(mean):.6f}", int(with_word)


if __name__ == "__main__":
    main()
