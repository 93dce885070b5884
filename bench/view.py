"""Latency of `capipe view` on 100,000 rows: first page, search, filter, histogram, threshold.

The artifacts are as the stages write them: image shards, captions of two prompts, scores of both. Each round starts its
own server, so nothing is cached from the round before; the files may be in the page cache, as after a stage that has
just written them. A page is the HTML, scripts, list of artifacts, columns, first rows and all of their images, one
after the other.

    python bench/view.py [--rows 100000] [--shard 10000] [--rounds 3] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from _common import report, version

from capipe.manifests.artifact import Artifact
from capipe.manifests.schema import ANNOTATE, INGEST, SCORE
from capipe.manifests.shards import uid_of
from capipe.pipeline.view.library import id_of

WORDS = ("a", "red", "green", "large", "square", "dog", "house", "left", "of", "the", "under", "sky", "street")
PICTURES = 500  # distinct images; every row still has distinct bytes
BOUND = 1.0  # seconds for the first page


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        if not (folder / "scores").exists():
            started = time.perf_counter()
            build(folder, options.rows, options.shard)
            print(f"{options.rows} rows written in {time.perf_counter() - started:.0f} s", flush=True)
        figures: dict[str, list[float]] = {}
        for number in range(options.rounds):
            for name, seconds in measured(folder, options.rows).items():
                figures.setdefault(name, []).append(seconds)
            print(
                f"round {number + 1}/{options.rounds}: { ({k: round(v[-1], 3) for k, v in figures.items()}) }",
                flush=True,
            )
    page = median(figures["page"])
    packages = {name: version(name) for name in ("fastapi", "uvicorn", "pyarrow")}
    report("view", figures, packages, rows=options.rows, shard=options.shard, bound=BOUND, within=page < BOUND)


def _options() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shard", type=int, default=10_000, help="rows of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder to make the artifacts in, or to find them in")
    return parser.parse_args()


# --- the artifacts ---------------------------------------------------------------------------------------------------


def build(folder: Path, rows: int, size: int) -> None:
    """Shards, captions and scores of ``rows`` images."""
    pictures = [_picture(seed) for seed in range(PICTURES)]
    total = -(-rows // size)
    shards = Artifact.create(str(folder / "shards"), "ingest", {}, {"sources": ["bench"], "shards_total": total})
    run = {"shards": str(folder / "shards"), "shards_total": total, "model": "bench"}
    captions = Artifact.create(str(folder / "captions"), "annotate", {"input": shards.fingerprint}, run)
    scores = Artifact.create(
        str(folder / "scores"), "score", {"input": shards.fingerprint, "captions": captions.fingerprint}, run
    )
    for shard in range(total):
        _write_shard(
            f"{shard:05d}", range(shard * size, min(rows, (shard + 1) * size)), pictures, shards, captions, scores
        )
    for artifact in (shards, captions, scores):
        artifact.close()


def _write_shard(
    name: str, numbers: range, pictures: list[bytes], shards: Artifact, captions: Artifact, scores: Artifact
) -> None:
    random = np.random.default_rng(numbers.start)
    bases = []
    with shards.begin(name, INGEST, tar=True) as out:
        for number in numbers:
            image = pictures[number % PICTURES] + b"%d" % number  # bytes after a JPEG's end are ignored
            key, text = f"{number:08d}", _sentence(random, 8)
            base = {"key": key, "uid": uid_of(image), "status": "ok", "error": None}
            bases.append((base, text))
            sha = hashlib.sha256(image).hexdigest()
            row = {"sha256": sha, "width": 96, "height": 72, "format": "jpg", "text": text, "source": f"{key}.jpg"}
            out.write({**base, **row}, {"jpg": image, "txt": text.encode(), "json": b"{}"})
        record = out.commit(rows_in=len(numbers), input_info={"digest": f"{numbers.start:064x}"})
    tar = record.files[f"{name}.tar"]
    info = {"digest": tar["sha256"], "bytes": tar["bytes"], "url": f"{shards.url}/{name}.tar"}
    with captions.begin(name, ANNOTATE) as captioned, scores.begin(name, SCORE) as scored:
        for base, text in bases:
            said = {"short": _sentence(random, 12), "dense": _sentence(random, 90)}
            entries = [_caption(prompt, caption) for prompt, caption in said.items()]
            captioned.write({**base, "text": text, "captions": entries})
            clip, itm = float(random.normal(0.28, 0.05)), float(random.beta(4, 2))
            more = {"re_caption": said["dense"], "re_length": 90, "re_clip_score": clip, "re_itm_score": itm}
            scored.write({**base, **more, "org_caption": text, "org_length": 8, "org_clip_score": clip - 0.03})
        captioned.commit(rows_in=len(bases), input_info=info)
        scored.commit(rows_in=len(bases), input_info=info)


def _caption(name: str, text: str) -> dict[str, Any]:
    count = len(text.split())
    more = {"prompt_id": "p", "finish_reason": "stop", "n_tokens": count, "attempts": 1, "status": "ok"}
    return {"name": name, "text": text, "model": "bench", **more}


def _sentence(random: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[index] for index in random.integers(0, len(WORDS), count)) + f" {random.integers(10**6)}."


def _picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


# --- the viewer ------------------------------------------------------------------------------------------------------


def measured(folder: Path, rows: int) -> dict[str, float]:
    """Latencies of one server, from the start of its command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "capipe.pipeline", "view", str(folder), "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert running.stdout is not None
        address, _, token = running.stdout.readline().strip().rpartition(": ")[2].partition("?token=")
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {token}"}, timeout=60) as client:
            _wait(client)
            server = time.perf_counter() - started
            before = _cpu(running.pid)
            page = _timed(lambda: _page(client))
            page_cpu = _cpu(running.pid) - before
            a = id_of("captions")
            figures = {
                "server": server,
                "page": page,
                "page_cpu": page_cpu,
                "command_to_page": server + page,
                "search": _timed(lambda: _counted(client, {"a": a, "search": "sky street under"}, rows)),
                "search_again": _timed(lambda: _counted(client, {"a": a, "search": "sky street under the"}, rows)),
                "filter": _timed(
                    lambda: _counted(client, {"a": a, "filter": "clip_score > 0.3 and itm_score > 0.5"}, rows)
                ),
                "histogram": _timed(lambda: _whole(client, "histogram", {"a": a, "column": "re_clip_score"})),
            }
            moves = [_timed(lambda v=v: _threshold(client, a, v)) for v in np.linspace(0.2, 0.36, 15)]
            return {**figures, "threshold": median(moves)}
    finally:
        running.terminate()
        running.wait(20)


def _wait(client: httpx.Client) -> None:
    while True:
        try:
            client.get("/").raise_for_status()
            return
        except httpx.ConnectError:
            time.sleep(0.01)


def _cpu(pid: int) -> float:
    """CPU seconds used by the server, less inflated than wall time on a busy machine."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _get(client: httpx.Client, path: str, parameters: dict[str, Any]) -> Any:
    return client.get(f"/api/{path}", params=parameters).raise_for_status().json()


def _page(client: httpx.Client) -> None:
    """The requests of a browser for the first page."""
    for name in ("", "style.css", "app.js", "dom.js", "state.js", "rows.js", "detail.js", "compare.js", "threshold.js"):
        client.get(f"/{name}").raise_for_status()
    listed = _get(client, "catalog", {})["artifacts"]
    a = next(entry["id"] for entry in listed if entry["name"] == "captions")
    _get(client, "columns", {"a": a})
    rows = _get(client, "rows", {"a": a})["rows"]
    assert len(rows) == 24 and all(row["values"] for row in rows)
    for row in rows:
        asked = {"a": a, "shard": row["shard"], "row": row["row"]}
        assert client.get("/api/image", params=asked).raise_for_status().content[:2] == b"\xff\xd8"


def _counted(client: httpx.Client, query: dict[str, Any], rows: int) -> None:
    """Count over all rows, in as many responses as that takes."""
    while not (answer := _get(client, "count", query))["done"]:
        pass
    assert answer["scanned"] == rows and 0 < answer["matched"] < rows, answer


def _whole(client: httpx.Client, path: str, query: dict[str, Any]) -> Any:
    while not (answer := _get(client, path, query))["done"]:
        pass
    return answer


def _threshold(client: httpx.Client, a: str, value: float) -> None:
    answer = _whole(client, "threshold", {"a": a, "column": "re_clip_score", "value": float(value)})
    assert len(answer["stay"]) == len(answer["go"]) == 5


if __name__ == "__main__":
    main()
