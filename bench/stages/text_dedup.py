"""Cost and recall of `capipe dedup --captions`: both passes over texts, at several sizes, by the command's own job.

Two kinds of texts. `web`: random sentences of 5 to 40 words of a vocabulary that is as skewed as that of a language, a
tenth of them copies of others in which some letters or words are changed, so that most of these pairs are near the
threshold; the recall is the share of pairs with a Jaccard index of at least the threshold that end in one group, and
every mark is checked by the exact index. `captioner`: the captions of a small captioner, all by the same grammar, of
which many resemble many. The search against all pairs compared (`slow`) is measured on a part of the `web` texts.

CPU seconds of one process; images are not read. Each size in its own process.

    python bench/stages/text_dedup.py [--sizes 20000 60000] [--rounds 1]  # docs/benchmarks.md: --sizes 100000 300000
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from _common import alternate, report, version

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, DEDUP
from capipe.manifests.shards import uid_of
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.scenes import scenes
from capipe.pipeline.jobs.texts.mark import mark, plan_texts, read
from capipe.stages.dedup.texts.bands import Bands, sign
from capipe.stages.dedup.texts.leaders import Meetings, group_texts, slow_group_texts
from capipe.stages.dedup.texts.marks import TextConfig
from capipe.stages.dedup.texts.shingles import jaccard, normalized, shingles

THRESHOLD = 0.8
PER_SHARD = 10_000
LETTERS = "etaoinshrdlcumwfgypbvk"
SLOW = 3000  # texts that are compared with each other


def web(count: int) -> tuple[list[str], list[int]]:
    """Texts, and for each the text that it is a changed copy of, itself for none."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(LETTERS, k=rng.randint(2, 10))) for _ in range(30_000)]
    weights = np.cumsum(1 / np.arange(1, len(vocabulary) + 1)).tolist()
    texts: list[str] = []
    copy_of = list(range(count))
    for number in range(count):
        if number % 10 != 9:
            texts.append(" ".join(rng.choices(vocabulary, cum_weights=weights, k=rng.randint(5, 40))))
            continue
        copy_of[number] = number - 1 - rng.randrange(9)
        words = texts[copy_of[number]].split()
        for _ in range(rng.randint(1, max(1, len(words) // 8))):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts.append(" ".join(words))
    return texts, copy_of


def captioner(count: int) -> tuple[list[str], list[int]]:
    """The same of a small captioner, whose texts are no copies of any in particular."""
    rng = random.Random(0)
    return [dense_caption(scene, rng) for scene in scenes("train", count, 0)], list(range(count))


KINDS: dict[str, Callable[[int], tuple[list[str], list[int]]]] = {"web": web, "captioner": captioner}


def written(folder: Path, texts: list[str]) -> None:
    """Marks and captions of as many images, which are not there: no tar is opened."""
    (folder / "shards").mkdir()
    marks = Artifact.create(str(folder / "marks"), "dedup", {}, {})
    captions = Artifact.create(str(folder / "captions"), "annotate", {}, {})
    for start in range(0, len(texts), PER_SHARD):
        name = f"{start // PER_SHARD:05d}"
        (folder / f"shards/{name}.tar").write_bytes(b"\0" * 1024)
        part = texts[start : start + PER_SHARD]
        with marks.begin(name, DEDUP) as one, captions.begin(name, ANNOTATE) as other:
            for number, text in enumerate(part, start):
                row = {"key": f"{number:09d}", "uid": uid_of(b"%d" % number), "status": "ok"}
                one.write({**row, "copies": 1, "group": row["uid"]})
                other.write({**row, "captions": [{"name": "a", "text": text, "status": "ok"}]})
            for out in (one, other):
                out.commit(rows_in=len(part), input_info={"digest": name})
    marks.close()
    captions.close()


def once(kind: str, count: int) -> dict[str, Any]:
    """Results of both passes over ``count`` texts in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts, copy_of = KINDS[kind](count)
        written(folder, texts)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        plan = plan_texts(
            *(str(folder / "shards"), str(folder / "out"), TextConfig(text_threshold=THRESHOLD)),
            captions=str(folder / "captions"),
            marks=str(folder / "marks"),
            workers=0,
        )
        assert plan.marks is not None
        stop, started = threading.Event(), time.process_time()
        read_texts, _ = read(plan, lambda event: None, stop)
        between = time.process_time()
        marked, _ = mark(plan, read_texts, plan.marks, lambda event: None, stop)
        seconds = {"read": between - started, "grouped": time.process_time() - between}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = sum(path.stat().st_size for path in (folder / "out/texts").glob("*.parquet"))
        rows = list(_rows(marked))
    run = marked.config["run"]
    return {
        **{f"cpu_seconds_{name}": round(value, 2) for name, value in seconds.items()},
        "cpu_seconds": round(sum(seconds.values()), 2),
        "peak_mib": round(peak),
        "before_mib": round(base),
        "bytes_per_row": round(size / count),
        "distinct": run["texts_distinct"],
        "crowded": run["texts_crowded"],
        "groups": len({group for group, _ in rows}),
        **_checked(texts, copy_of, rows),
    }


def _rows(marked: Artifact) -> Iterator[tuple[str, float]]:
    for shard in marked.committed():
        table = marked.table(shard, ["text_group", "text_similarity"])
        yield from zip(table["text_group"].to_pylist(), table["text_similarity"].to_pylist(), strict=True)


def _checked(texts: list[str], copy_of: list[int], rows: list[tuple[str, float]]) -> dict[str, Any]:
    """Recall of planted pairs, and how many marks are wrong by the exact index."""
    sets = [shingles(normalized(text)) for text in texts]
    leaders = {group: number for number, (group, near) in enumerate(rows) if near == 1.0}
    wrong = sum(
        not math.isclose(jaccard(sets[n], sets[leaders[g]]), near, abs_tol=1e-6) for n, (g, near) in enumerate(rows)
    )
    wrong += sum(bool(near < np.float32(THRESHOLD)) for _, near in rows)
    planted = [(jaccard(sets[n], sets[of]), n, of) for n, of in enumerate(copy_of) if n != of]
    found = {n for near, n, of in planted if rows[n][0] == rows[of][0] or min(rows[n][1], rows[of][1]) < 1}
    recall = {}
    for name, least, most in (("recall", THRESHOLD, 2.0), ("recall_at_threshold", THRESHOLD, THRESHOLD + 0.02)):
        pairs = [n for near, n, _ in planted if least <= near < most]
        recall[name] = round(len([n for n in pairs if n in found]) / len(pairs), 5) if pairs else None
        recall[f"{name}_pairs"] = len(pairs)
    return {"wrong_marks": wrong, **recall}


def searched(fast: bool) -> float:
    """CPU seconds of grouping some texts: by bands, signatures included, or by all pairs."""
    sets = [shingles(text) for text in dict.fromkeys(map(normalized, web(SLOW)[0]))]
    priority, started = np.arange(len(sets)), time.process_time()
    if fast:
        signatures = sign(sets)
        meetings = Meetings.of(Bands.of(THRESHOLD).keys(signatures).T)
        group_texts(priority, meetings, signatures, sets.__getitem__, THRESHOLD)
    else:
        slow_group_texts(priority, sets, THRESHOLD)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ROWS"), help="one size in this process, as JSON")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(once(options.one[0], int(options.one[1]))))
        return
    results: dict[str, dict[str, Any]] = {}

    def seconds(kind: str, size: int) -> float:
        command = [sys.executable, __file__, "--one", kind, str(size)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if result["wrong_marks"]:
            sys.exit(f"{kind}, {size}: {result['wrong_marks']} marks are wrong")
        results[f"{kind}_{size}"] = result
        return float(result["cpu_seconds"])

    cases = [(kind, size) for kind in options.kinds for size in options.sizes]
    sides = {f"{kind}_{size}": lambda _, kind=kind, size=size: seconds(kind, size) for kind, size in cases}
    sides |= {"search": lambda _: searched(True), "slow": lambda _: searched(False)}
    figures = alternate(sides, options.rounds)
    least, most = min(options.sizes), max(options.sizes)
    growth = {k: results[f"{k}_{most}"]["cpu_seconds"] / results[f"{k}_{least}"]["cpu_seconds"] for k in options.kinds}
    report(
        "text_dedup",
        figures,
        {"numpy": version("numpy"), "rensa": version("rensa")},
        unit="CPU seconds",
        threshold=THRESHOLD,
        growth={kind: round(value, 2) for kind, value in growth.items()},
        growth_of_rows=round(most / least, 2),
        ratio=round(figures["slow"][0] / figures["search"][0], 1),
        slow_texts=SLOW,
        results=results,
    )


if __name__ == "__main__":
    main()
