"""Commands over many shards: core-seconds of each step, and the exponent of its growth with the number of shards.

Steps: `start` and `resume` of `capipe annotate` up to its first image (no shard done, all done, all but one), a
`commit`'s 20 shards, `status`, `select` (`filter --scores --index`), `select_resume` and `export` (nothing left to
copy), `export_last` (its last files), `report`, and `view`'s first page.
Each step runs in a process of its own, first over ten shards so that imports do not count. The exponent is
that of core-seconds between two numbers of shards of the same size.

    python bench/scaling.py [--shards 1000 10000] [--rows 100] [--keep FOLDER] [--steps status report]
    python bench/scaling.py --shards 1000 10000 100000 --rows 10
    python bench/scaling.py --large 5000000        # report and viewer of 500 shards of 10,000 rows: time and memory
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from _common import report, version
from _synthetic import CARD, annotate, build

from capipe.manifests.artifact import Artifact
from capipe.manifests.manifest import LINES
from capipe.manifests.schema import ANNOTATE
from capipe.pipeline.commands.run_job import progress_of
from capipe.pipeline.runners.shard_queue import ShardQueue

WARM = 10  # shards of the first run
KEPT = "clip_score > 0.3"
ROWS_OF_SHARD = 10_000  # of --large


def main() -> None:
    options = _options()
    if options.step:
        _child(options.step, options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        if options.large:
            _large(folder / f"large-{options.large}", options.large)
        else:
            _small(folder, options)


def _options() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--rows", type=int, default=100, help="of a shard")
    parser.add_argument("--large", type=int, default=0, help="rows for report and viewer alone")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--keep", type=Path, help="folder to make the artifacts in, or to find them in")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _small(folder: Path, options: Any) -> None:
    folders = {count: _built(folder / f"{count}x{options.rows}", count, options.rows) for count in options.shards}
    figures: dict[str, dict[int, float]] = {}
    commands: dict[str, float] = {}
    for name, count in itertools.product(options.steps, options.shards):
        inside, whole = _measured(name, folders[count])
        figures.setdefault(name, {})[count] = inside
        commands[name] = whole  # of the most shards
        print(f"{name}, {count} shards: {inside:.3f} core-seconds, {whole:.1f} with start-up", flush=True)
    exponents = {name: _exponents(by_count) for name, by_count in figures.items() if name != "commit"}
    worst = max((value for found in exponents.values() for value in found.values()), default=None)
    together = [commands[name] for name in ("start", "resume", "resume_one") if name in commands]
    report(
        "scaling",
        {},
        {"pyarrow": version("pyarrow")},
        shards=options.shards,
        rows_per_shard=options.rows,
        exponent=worst,
        start_resume_s=round(sum(together), 2) if together else None,
        status_s=round(commands["status"], 2) if "status" in commands else None,
        core_seconds={name: {n: round(value, 3) for n, value in by.items()} for name, by in figures.items()},
        exponents=exponents,
    )


def _exponents(by_count: dict[int, float]) -> dict[str, float]:
    return {
        f"{low}-{high}": round(math.log(by_count[high] / by_count[low]) / math.log(high / low), 3)
        for low, high in itertools.pairwise(by_count)
    }


def _built(folder: Path, shards: int, rows: int, tars: int | None = None) -> Path:
    """The artifacts, and beside them small ones to warm up with."""
    for place, count in ((folder / "all", shards), (folder / "warm", WARM)):
        if not (place / "complete").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            started = time.process_time()
            build(place, count, rows, tars)
            (place / "complete").touch()
            print(f"{count} shards made in {time.process_time() - started:.0f} core-seconds", flush=True)
    return folder


def _measured(name: str, folder: Path) -> tuple[float, float]:
    """Core-seconds of a step over all shards, and of the whole process that ran it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])), _spent(resource.RUSAGE_CHILDREN, before)


def _spent(whose: int, before: resource.struct_rusage) -> float:
    after = resource.getrusage(whose)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _child(name: str, folder: Path) -> None:
    step = STEPS[name]
    with contextlib.redirect_stdout(io.StringIO()):
        step(folder / "warm")
        before = resource.getrusage(resource.RUSAGE_SELF)
        step(folder / "all")
        seconds = _spent(resource.RUSAGE_SELF, before)
    print(seconds)


# --- steps -----------------------------------------------------------------------------------------------------------


def _start(folder: Path) -> None:
    """`capipe annotate` into a new folder, to the first shard."""
    shutil.rmtree(folder / "started", ignore_errors=True)
    job = annotate(folder, "started")
    try:
        progress_of(job)
        assert ShardQueue(job.artifact, print, job.todo).next() is not None
    finally:
        job.artifact.close()
        shutil.rmtree(folder / "started")


def _resume(folder: Path) -> None:
    """The same with all shards done, to its last line."""
    job = annotate(folder, "captions")
    progress_of(job)
    job.artifact.close()
    assert not job.todo
    _capipe("status", folder / "captions")


def _resume_one(folder: Path) -> None:
    """The same with one shard missing."""
    lines = folder / "captions" / LINES
    whole = lines.read_bytes()
    try:
        lines.write_bytes(whole[: whole[:-1].rfind(b"\n") + 1])
        job = annotate(folder, "captions")
        progress_of(job)
        assert ShardQueue(job.artifact, print, job.todo).next() is not None and len(job.todo) == 1
        job.artifact.close()
    finally:
        lines.write_bytes(whole)


def _commit(folder: Path) -> None:
    """20 commits to an artifact with all the others: by one run, in core-seconds for all of them."""
    lines = folder / "captions" / LINES
    whole = lines.read_bytes()
    artifact = Artifact.open(str(folder / "captions"))
    try:
        for number in range(20):
            with artifact.begin(f"more-{number}", ANNOTATE) as out:
                out.write({"key": "0", "uid": None, "status": "missing", "error": "none"})
                out.commit(rows_in=1, input_info={"digest": "0"})
    finally:
        lines.write_bytes(whole)
        for path in (folder / "captions").glob("more-*"):
            path.unlink()


def _status(folder: Path) -> None:
    _capipe("status", folder)


def _select(folder: Path) -> None:
    shutil.rmtree(folder / "selected", ignore_errors=True)
    _select_resume(folder)


def _select_resume(folder: Path) -> None:
    where = ("--shards", folder / "images", "--scores", folder / "scores", "--out", folder / "selected")
    _capipe("filter", *where, "--keep", KEPT, "--index", "--workers", 0)


def _export_last(folder: Path) -> None:
    """The last files of an export of which all shards are there."""
    (folder / "export/README.md").unlink(missing_ok=True)
    _export(folder)


def _export(folder: Path) -> None:
    """A complete export again."""
    options = ("--title", CARD.title, "--image-extension", "keep", "--workers", 0)
    _capipe("export", folder / "images", "--out", folder / "export", *options)


def _report(folder: Path) -> None:
    _capipe("report", folder)


def _view(folder: Path) -> None:
    """The requests of a browser for the first page, of captions."""
    from starlette.testclient import TestClient

    from capipe.pipeline.view.app import create_app
    from capipe.pipeline.view.library import Library

    _first_page(TestClient(create_app(Library(folder))))


def _first_page(client: httpx.Client) -> None:
    listed = client.get("/api/catalog").raise_for_status().json()["artifacts"]
    captions = next(entry for entry in listed if entry["name"] == "captions")
    a, count = captions["id"], min(24, sum(captions["rows"].values()))
    client.get("/api/columns", params={"a": a}).raise_for_status()
    rows = client.get("/api/rows", params={"a": a}).raise_for_status().json()["rows"]
    assert len(rows) == count and all(row["values"] for row in rows)
    for row in rows:
        place = {"a": a, "shard": row["shard"], "row": row["row"]}
        assert client.get("/api/image", params=place).raise_for_status().content[:2] == b"\xff\xd8"


def _capipe(*words: object) -> None:
    from capipe.pipeline.cli import app

    code = app([str(word) for word in words], standalone_mode=False)
    assert not code, f"{words} ended with {code}"


STEPS: dict[str, Callable[[Path], None]] = {
    "start": _start,
    "resume": _resume,
    "resume_one": _resume_one,
    "commit": _commit,
    "status": _status,
    "select": _select,
    "select_resume": _select_resume,
    "export_last": _export_last,
    "export": _export,
    "report": _report,
    "view": _view,
}


# --- five million rows -----------------------------------------------------------------------------------------------


def _large(folder: Path, rows: int) -> None:
    """Report and viewer as processes of their own. Tars are there for the first shards alone: no more are opened."""
    place = _built(folder, rows // ROWS_OF_SHARD, ROWS_OF_SHARD, tars=2) / "all"
    written = _watched([*CAPIPE, "report", str(place), "--out", str(folder / "report.html")])
    figures = {"report_s": [written[0]], "report_cpu_s": [written[1]]}
    served = _served(place)
    figures |= {"server_s": [served[0]], "page_s": [served[1]]}
    peaks = {"report": round(written[2]), "view": round(served[2])}
    within = served[1] < 1 and max(peaks.values()) < 1024
    report("scaling_large", figures, {"pyarrow": version("pyarrow")}, rows=rows, peak_mib=peaks, within=within)


CAPIPE = [sys.executable, "-m", "capipe.pipeline"]


def _watched(command: list[str]) -> tuple[float, float, float]:
    """Wall and core-seconds of a command, and its peak of resident memory in MiB."""
    started, peak, cpu = time.perf_counter(), 0.0, 0.0
    running = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while running.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak, cpu = max(peak, running.memory_info().rss / 2**20), sum(running.cpu_times()[:2])
        time.sleep(0.02)
    if running.returncode:
        sys.exit(f"{command} ended with {running.returncode}")
    return time.perf_counter() - started, cpu, peak


def _served(place: Path) -> tuple[float, float, float]:
    """Seconds until the viewer answers and of its first page, and its peak of resident memory in MiB."""
    started = time.perf_counter()
    running = psutil.Popen([*CAPIPE, "view", str(place), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        address, _, token = running.stdout.readline().strip().rpartition(": ")[2].partition("?token=")
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {token}"}, timeout=120) as client:
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    client.get("/")
                    break
                time.sleep(0.01)
            ready = time.perf_counter()
            _first_page(client)
            ended = time.perf_counter()
        status = Path(f"/proc/{running.pid}/status").read_text()
        peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return ready - started, ended - ready, peak
    finally:
        running.terminate()
        running.wait(20)


if __name__ == "__main__":
    main()
