"""Cost of the second pass of `capipe dedup`: the search for near hashes, its former version, and the whole pass.

Each size of each kind is measured in a process of its own, in core-seconds, on one thread. The search is that of the
command: every table a task that reads the hashes and commits its pairs. The former version, which is the slow twin of
the tests (multi-index hashing), is measured in the same run, up to a size: its time grows with the square.
A tenth of the hashes are near another, at most seven bits away, and all these pairs have to be found.

Kinds: "uniform" hashes are evenly spread. Bits of "skewed" ones are set with probabilities from 0.15 to 0.85, one
always: as many have equal keys of 24 bits as those of 24,000 crops of photographs (one pair of 2^18 or 2^19).

The whole pass (--images) runs the command's job on hashes of made-up images: rendered scenes' signatures under skewed
hashes, a tenth of them copies (half of those cropped), a twentieth pairs of near hashes that show something else.
Also measured: candidates confirmed per second by their signatures, by both versions, and images hashed per second.

    python bench/dedup.py --sizes 300000 1000000 3000000 10000000 --images 1000000 [--rounds 1]

Keys: `speedup_1m`, `core_minutes_10m`, `growth_1m_to_10m` (core-seconds) are the worst of both kinds, null for sizes
that were not measured. 10 M take 4 core-minutes, and 1 M images 8 GB of disk.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from _common import alternate, report, version

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import HASHES
from capipe.manifests.shards import InputShard
from capipe.models.images.decode import ImageLimits, Thumbnail, thumbnail
from capipe.models.tiny.world.corpus import samples
from capipe.pipeline.jobs.dedup import DedupPlan, mark
from capipe.pipeline.runners.messages import Event, Note
from capipe.pipeline.runners.placement import TaskPlacement
from capipe.stages.dedup.arrays import U64, Indices
from capipe.stages.dedup.marks import DedupConfig
from capipe.stages.dedup.near.files import all_numbers
from capipe.stages.dedup.near.table_search import PAIR_COLUMNS, table_tasks, write_table, write_values
from capipe.stages.dedup.perceptual_hash import DECODED_SIDE, SIGNATURE_BYTES, Signatures, looks
from capipe.stages.dedup.search.multi_index import near_pairs
from capipe.stages.dedup.signatures import confirm, slow_confirm

KINDS = ("uniform", "skewed")
RADIUS = DedupConfig().radius
FORMER_UP_TO = 1_000_000
PER_SHARD = 10_000  # rows


def hashes_of(kind: str, count: int, rng: np.random.Generator) -> U64:
    """Hashes of a kind, of which a few may be equal."""
    if kind == "uniform":
        return rng.integers(0, 1 << 64, count, dtype=np.uint64)
    share = rng.permutation(np.linspace(0.15, 0.85, 64))
    share[17] = 1
    out = np.zeros(count, dtype=np.uint64)
    for bit in range(64):
        out |= (rng.random(count, dtype=np.float32) < share[bit]).astype(np.uint64) << np.uint64(bit)
    return out


def near(hashes: U64, rng: np.random.Generator) -> U64:
    """A hash from one to seven bits away from each."""
    out = hashes.copy()
    bits = rng.integers(1, RADIUS + 1, len(hashes))
    for turn in range(RADIUS):
        flip = np.uint64(1) << rng.integers(0, 64, len(out), dtype=np.uint64)
        out ^= np.where((turn < bits) & (np.bitwise_count(out ^ flip ^ hashes) <= bits), flip, np.uint64(0))
    return out


def searched(kind: str, count: int, former: bool) -> dict[str, float]:
    """Core-seconds and peak MiB of the search among ``count`` hashes in this process, and the near pairs."""
    rng = np.random.default_rng(count)
    planted = count // 10
    hashes = hashes_of(kind, count - planted, rng)
    pairs = np.stack([hashes[:planted], near(hashes[:planted], rng)])
    hashes = np.unique(np.concatenate([hashes, pairs[1]]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.process_time()
    left, right = _by_multi_index(hashes) if former else _by_tables(hashes)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wanted = np.searchsorted(hashes, pairs[:, pairs[0] != pairs[1]])
    missing = int((~np.isin(_codes(*wanted, count), _codes(left, right, count))).sum())
    if missing:
        sys.exit(f"{kind}, {count}: {missing} of {planted} planted pairs were not found")
    return {"seconds": seconds, "peak_mib": peak, "before_mib": before, "pairs": len(left), "planted": planted}


def _by_tables(hashes: U64) -> tuple[Indices, Indices]:
    """Near pairs, as positions in the hashes, by the tasks of the command."""
    with tempfile.TemporaryDirectory() as folder:
        work = Artifact.create(f"{folder}/work", "near", {}, {})
        write_values(hashes, work)
        tasks = table_tasks(hashes, RADIUS)
        for number, task in enumerate(tasks):
            write_table(task, work)
            if number % 50 == 49:
                print(f"{number + 1} of {len(tasks)} tables", file=sys.stderr, flush=True)
        parts = [all_numbers(work, task.name, PAIR_COLUMNS) for task in tasks]
        work.close()
    left, right = (np.searchsorted(hashes, np.concatenate([part[side] for part in parts])) for side in (0, 1))
    return left, right


def _by_multi_index(hashes: U64) -> tuple[Indices, Indices]:
    """Near pairs by the former search."""
    found = [(i[i < j], j[i < j]) for i, j in near_pairs(hashes, hashes, RADIUS)]
    left, right = (np.concatenate([part[side] for part in found]) for side in (0, 1))
    return left, right


def _codes(left: Indices, right: Indices, width: int) -> Indices:
    codes: Indices = np.minimum(left, right) * width + np.maximum(left, right)
    return codes


def scenes(count: int, seed: int) -> tuple[Signatures, Signatures]:
    """Signatures of rendered scenes, and of slightly cropped copies: of the kind that is the most costly to confirm."""
    pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples(count, "heldout", seed, size=256)]
    cropped = [picture.crop((5, 5, 251, 251)) for picture in pictures]
    whole, crops = (
        np.stack([np.frombuffer(looks(image).signature, dtype=np.uint8) for image in side])
        for side in (pictures, cropped)
    )
    return whole, crops


def confirmed_per_second(count: int = 256) -> dict[str, float]:
    """Candidate pairs that one thread confirms per core-second, all of the expensive kind that is aligned first."""
    left, right = scenes(count, 3)
    rates = {}
    for name, judge in (("now", confirm.same_picture), ("former", slow_confirm.same_picture)):
        started = time.process_time()
        share = judge(left, right).mean()
        rates[name] = round(count / (time.process_time() - started))
        if share < 0.9:
            sys.exit(f"of the cropped copies only {share:.2f} were found")
    return {**rates, "ratio": round(rates["now"] / rates["former"], 2)}


def whole_pass(images: int) -> dict[str, Any]:
    """Wall and core-seconds of the second pass over so many images, with the workers of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        shards, copies = _write_hashes(f"{folder}/out/hashes", images)
        plan = DedupPlan(
            config=DedupConfig(),
            pattern=folder,
            shards=shards,
            against=(),
            embeddings=None,
            width=0,
            references=(),
            scores=None,
            devices=(),
            out=f"{folder}/out",
            placement=TaskPlacement(WORKERS),
            fresh=False,
            share=False,
        )
        hashes = Artifact.open(f"{folder}/out/hashes")
        started, busy = time.perf_counter(), _busy()
        marks, _ = mark(plan, hashes, None, _noted, threading.Event())
        seconds, busy = time.perf_counter() - started, _busy() - busy
        rows: dict[str, int] = {}
        for record in marks.committed().values():
            for status, number in record.rows.items():
                rows[status] = rows.get(status, 0) + number
        marks.close()
        hashes.close()
    if rows.get("duplicate", 0) < 0.95 * copies:
        sys.exit(f"of {copies} copies only {rows.get('duplicate', 0)} are marked")
    figures = {"minutes": seconds / 60, "core_minutes": busy / 60}
    rounded = {name: round(value, 2) for name, value in figures.items()}
    return {"images": images, **rounded, "workers": WORKERS, "copies": copies, "rows": rows}


WORKERS = 2


def _noted(event: Event) -> None:
    if isinstance(event, Note):
        print(event.text, file=sys.stderr, flush=True)


def _busy() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _write_hashes(url: str, images: int) -> tuple[list[InputShard], int]:
    """Commit hashes of made-up images; the shards that they are of, and the number of copies among them."""
    rng = np.random.default_rng(images)
    whole, cropped = scenes(1000, 5)
    others = images // 20  # near an image that shows something else
    copies = images // 10
    base = images - copies - others
    phash = hashes_of("skewed", base, rng)
    shown = rng.integers(0, len(whole), base)
    is_crop = np.zeros(images, dtype=bool)
    is_crop[base + others : base + others + copies // 2] = True
    strange = (shown[:others] + rng.integers(1, len(whole), others)) % len(whole)
    shown = np.concatenate([shown, strange, shown[others : others + copies]])
    phash = np.concatenate([phash, near(phash[: others + copies], rng)])
    order = rng.permutation(images)
    artifact = Artifact.create(url, "hash", {"input": None}, {})
    shards = []
    for number, start in enumerate(range(0, images, PER_SHARD)):
        part = order[start : start + PER_SHARD]
        inner = near(phash[part], rng)
        signatures = np.where(is_crop[part, None], cropped[shown[part]], whole[shown[part]])
        signatures[:, -8:] = rng.integers(127, 130, (len(part), 8))  # no two are the same
        _write_shard(artifact, f"{number:05}", part, phash[part], inner, signatures, rng)
        shards.append(InputShard(f"{number:05}", f"{url}/{number:05}.tar"))
    artifact.close()
    return shards, copies


def _write_shard(
    artifact: Artifact,
    name: str,
    rows: Indices,
    phash: U64,
    inner: U64,
    signatures: Signatures,
    rng: np.random.Generator,
) -> None:
    count = len(rows)
    digests = [rng.bytes(32).hex() for _ in range(count)]
    columns = {
        "key": [f"{row:09}" for row in rows.tolist()],
        "uid": [digest[:32] for digest in digests],
        "status": ["ok"] * count,
        "sha256": digests,
        "width": np.full(count, 256),
        "height": np.full(count, 256),
        "phash": phash,
        "inner": inner,
        "signature": [bytes(one) for one in signatures],
        "look": rng.integers(0, 1 << 64, count, dtype=np.uint64),
    }
    table = pa.table(
        [pa.array(columns.get(field.name, [None] * count), type=field.type) for field in HASHES], schema=HASHES
    )
    with artifact.begin_files(name) as out:
        with out.writing(f"{name}.parquet") as file:
            pq.write_table(table, file, row_group_size=1000, compression="zstd")
        out.commit(rows={"ok": count}, input_info={"digest": ""})


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
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 300_000], help="hashes")
    parser.add_argument("--images", type=int, default=20_000, help="images of the whole second pass; 0 for none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "HASHES", "VERSION"), help="one search, figures as JSON")
    options = parser.parse_args()
    if options.one is not None:
        kind, count, side = options.one
        print(json.dumps(searched(kind, int(count), side == "former")))
        return
    results: dict[str, dict[str, float]] = {}

    def seconds(side: str) -> float:
        kind, count, searcher = side.split()
        command = [sys.executable, __file__, "--one", kind, count, searcher]
        results[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        return results[side]["seconds"]

    sides = [f"{kind} {size} now" for kind in KINDS for size in options.sizes]
    sides += [f"{kind} {size} former" for kind in KINDS for size in options.sizes if size <= FORMER_UP_TO]
    figures = alternate({side: lambda _, side=side: seconds(side) for side in sides}, options.rounds)
    took = {side: median(rounds) for side, rounds in figures.items()}
    for side in sides:
        now = results[side.replace("former", "now")]
        if results[side]["pairs"] != now["pairs"]:
            sys.exit(f"{side} found {results[side]['pairs']} pairs, the present search {now['pairs']}")

    def worst(of: str, divided_by: str | None = None, pick: Callable[..., float] = max) -> float | None:
        """Of both kinds the worst figure, or quotient of figures."""
        if any(f"{kind} {side}" not in took for kind in KINDS for side in (of, divided_by or of)):
            return None
        return pick(
            took[f"{kind} {of}"] / (took[f"{kind} {divided_by}"] if divided_by is not None else 60) for kind in KINDS
        )

    speedup = worst(f"{FORMER_UP_TO} former", f"{FORMER_UP_TO} now", min)
    minutes, growth = worst("10000000 now"), worst("10000000 now", "1000000 now")
    report(
        "dedup",
        figures,
        {"numpy": version("numpy")},
        unit="core-seconds",
        speedup_1m=_rounded(speedup),
        core_minutes_10m=_rounded(minutes),
        growth_1m_to_10m=_rounded(growth),
        peak_mib={side: round(result["peak_mib"]) for side, result in results.items()},
        pairs={side: result["pairs"] for side, result in results.items()},
        second_pass=whole_pass(options.images) if options.images else None,
        signature_bytes=SIGNATURE_BYTES,
        pairs_confirmed_per_core_second=confirmed_per_second(),
        images_hashed_per_core_second=round(looked_at_per_second()),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


if __name__ == "__main__":
    main()
