"""The command line. Each command checks its options, hands them on, prints what came of it and sets the exit code.

Exit codes: 0 all done and every row's fate is final; 1 done, but rows or shards are to be tried again, or verification
found faults; 2 something given cannot be used; 3 the run could not go on; 130 stopped by Ctrl-C, to be resumed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..errors import BadInput, CapipeError
from .interrupts import interrupts
from .worker import disk_text

app = typer.Typer(
    name="capipe",
    help="Caption datasets for pretraining vision-language models: image shards in, verified captions out.\n\n"
    + (__doc__ or "").split("\n\n", 1)[1],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Exit(IntEnum):
    """See the module's text, which is also what `capipe --help` shows."""

    OK = 0
    UNRESOLVED = 1
    BAD_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130


def main() -> None:
    """Entry point: errors meant for people become one line on stderr and their exit code."""
    try:
        app()
    except CapipeError as error:
        print(f"capipe: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # a full disk, a folder that is not ours: nothing a traceback would explain
        print(f"capipe: {disk_text(error)}", file=sys.stderr)
        raise SystemExit(Exit.FAILED) from None
    except KeyboardInterrupt:
        print("capipe: stopped; what was finished is kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(Exit.INTERRUPTED) from None


Config = TypeVar("Config", bound=BaseModel)
Out = Annotated[str, typer.Option("--out", help="Folder (or fsspec URL) of the artifact to write.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: remove what another configuration left in --out.")]


@app.command()
def ingest(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of images, tars, Parquet/CSV/JSONL of paths, saved datasets, or hf://name[:split]."
        ),
    ],
    out: Out,
    shard_size: Annotated[int, typer.Option(help="Items per shard, usable or not.")] = 10_000,
    min_side: Annotated[int, typer.Option(help="Images with a shorter side of fewer pixels are too_small.")] = 16,
    max_image_pixels: Annotated[int, typer.Option(help="Larger images are too_large; they are not decoded.")] = 10**8,
    max_aspect: Annotated[float, typer.Option(help="Longest over shortest side; beyond it, unsupported.")] = 200.0,
    path_column: Annotated[str | None, typer.Option(help="Column of paths in tables, if it has no usual name.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one per core by default.")] = None,
    fresh: Fresh = False,
) -> None:
    """Turn images from anywhere into checked, hashed shards; every file, member and table row becomes a row."""
    from ..stages.ingest import IngestConfig
    from .ingesting import execute_ingest, plan_ingest
    from .progress import Progress

    config = validated(
        IngestConfig,
        shard_size=shard_size,
        min_side=min_side,
        max_image_pixels=max_image_pixels,
        max_aspect=max_aspect,
        path_column=path_column,
    )
    plan = plan_ingest(sources, out, config, workers=workers, fresh=fresh)
    stop = threading.Event()
    progress = Progress("ingest", None, len(plan.artifact.committed()), ready=time.monotonic())
    try:
        with progress.shown(Console(stderr=True)) as report, interrupts(stop.set):
            outcome = execute_ingest(plan, report, stop)
    finally:
        plan.artifact.close()
    raise typer.Exit(conclude(out, outcome.interrupted, progress.finished_line()))


@app.command()
def annotate(
    shards: Annotated[str, typer.Option(help="Folder, glob, {00000..00099}.tar or fsspec URL of WebDataset tars.")],
    out: Out,
    model: Annotated[str, typer.Option(help="tiny/captioner, a folder, or a Hugging Face id.")],
    engine: Annotated[str, typer.Option(help="auto, vllm, transformers, or the URL of a server.")] = "auto",
    prompt: Annotated[
        list[str] | None, typer.Option(help="plain, short, dense, caprl, name=text or name=@file; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Captions per prompt and image.")] = 1,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest caption in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Source of every draw, with each image's uid.")] = 0,
    max_attempts: Annotated[int, typer.Option(help="Rolls of an unhealthy caption, the first included.")] = 3,
    max_pixels: Annotated[
        int | None, typer.Option(help="Largest image area the model sees; its own by default.")
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(help="Smallest image area the model sees.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float16.")
    ] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Context length to make room for.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in the engine at once.")] = None,
    gpus: Annotated[str | None, typer.Option(help="GPUs to use, e.g. 0,1; all by default; none for CPU.")] = None,
    gpu_memory: Annotated[float, typer.Option(help="Share of GPU memory for vLLM.")] = 0.9,
    decode_workers: Annotated[int | None, typer.Option(help="Image decoding processes per engine.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a server's answer.")] = 300.0,
    pack: Annotated[
        bool, typer.Option(help="Also write tars with the images (bytes as they came) and captions.")
    ] = False,
    retry: Annotated[bool, typer.Option(help="Do rows again that ended in engine_error.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Append a line per engine request to this file.")] = None,
    fresh: Fresh = False,
) -> None:
    """Caption every image of the shards; one row out for every row in, whatever became of it."""
    from ..models.images import ImageLimits
    from ..models.loading import EngineConfig
    from ..stages.annotate import AnnotateConfig
    from ..stages.prompts import parse_prompt
    from . import annotating

    devices = [] if "://" in engine else visible_gpus(gpus)
    config = validated(
        AnnotateConfig,
        prompts=tuple(parse_prompt(option) for option in prompt or ["plain"]),
        samples=samples,
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        max_attempts=max_attempts,
    )
    stage = annotating.AnnotateStage(
        config=config,
        engine=EngineConfig(
            kind=engine,
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            concurrency=concurrency,
            gpu_memory_utilization=gpu_memory,
            timeout_s=timeout,
        ),
        limits=ImageLimits(),
        model_name=model,
        decode_workers=decode_workers or default_decode_workers(len(devices)),
        pack=pack,
        trace=trace,
    )
    plan = annotating.plan(stage, shards, out, fresh=fresh, retry=retry)
    try:
        progress = progress_of("annotate", plan)
        with progress.shown(Console(stderr=True)) as report:
            outcome = annotating.execute(plan, report, devices)
    finally:
        plan.artifact.close()
    raise typer.Exit(conclude(out, outcome.interrupted, progress.finished_line()))


@app.command()
def verify(artifact: Annotated[str, typer.Argument(help="Folder or URL of an artifact.")]) -> None:
    """Re-read every checksum, count and key of an artifact, and compare its rows with its input's."""
    from ..manifests.verify import verify as check

    report = check(artifact)
    for note in report.notes:
        print(f"note: {note}")
    for fault in report.faults:
        print(f"fault: {fault}")
    rows = ", ".join(f"{count} {status}" for status, count in sorted(report.rows.items())) or "no rows"
    verdict = f"{len(report.faults)} faults" if report.faults else "clean"
    print(f"{artifact}: {verdict}; {report.shards} shards, {report.bytes:,} bytes, {rows}")
    raise typer.Exit(Exit.UNRESOLVED if report.faults else Exit.OK)


@app.command()
def status(
    artifact: Annotated[str, typer.Argument(help="Folder or URL of an artifact.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show where a run stands: shards, rows by status, what is unfinished or quarantined."""
    from .status import state

    found = state(artifact)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
        return
    print_state(artifact, found)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=3, help="Rendered pictures.")] = 400,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
) -> None:
    """Render pictures, ingest them, caption them with the bundled captioner, verify all of it, and say where it is."""
    from .demo import lines, run_demo

    report = run_demo(out, images, engine, lambda text: print(f"\n== {text}", flush=True))
    print("\n" + "\n".join(lines(report)))


@app.command()
def doctor() -> None:
    """Show engines, devices and versions found, what is missing, and how to get it."""
    from .doctor import examine

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    findings = examine()
    for finding in findings:
        mark = "ok" if finding.mend is None else ("MISSING" if finding.required else "-")
        table.add_row(mark, finding.name, finding.found + (f"  ->  {finding.mend}" if finding.mend else ""))
    Console(soft_wrap=True).print(table)
    raise typer.Exit(Exit.UNRESOLVED if any(f.mend and f.required for f in findings) else Exit.OK)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def validated(kind: type[Config], **values: Any) -> Config:
    """A stage's config from options; what pydantic refuses becomes one line that names the option."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"{option}: {first['msg']} (got {first['input']!r})") from None


def visible_gpus(option: str | None) -> list[str]:
    """GPUs to use by their CUDA numbers: ``--gpus``, else all that are visible; an empty list where there are none."""
    if option is not None:
        names = [name.strip() for name in option.split(",") if name.strip()]
        return [""] if names in ([], ["none"]) else names  # one worker that sees no GPU
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    import torch  # asks the driver without starting CUDA in this process

    return [str(i) for i in range(torch.cuda.device_count())]


def default_decode_workers(gpus: int) -> int:
    """Decoding processes per engine: the cores shared out, one kept for the engine, never more than 16."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(16, cores // max(1, gpus) - 1))


def progress_of(stage: str, plan: Any) -> Any:
    """The progress display for a plan: totals known from the input's manifest, and what earlier runs did."""
    from .progress import Progress

    records = [shard.record for shard in plan.shards]
    total = sum(r.count for r in records) if all(records) else None
    committed = plan.artifact.committed()
    before = sum(record.count for record in committed.values())
    done = len(plan.shards) - len(plan.todo)
    return Progress(stage, len(plan.shards), done, total, before)


def conclude(out: str, interrupted: bool, line: str) -> Exit:
    """Print a run's last lines and choose its exit code."""
    from .status import state

    found = state(out)
    print(line, file=sys.stderr)
    print_state(out, found)
    if interrupted and not found.complete:
        print("stopped; run the same command to go on", file=sys.stderr)
        return Exit.INTERRUPTED
    if found.unresolved:
        print(f"{found.unresolved} rows ended in engine_error; add --retry to do them again", file=sys.stderr)
    return Exit.OK if found.complete else Exit.UNRESOLVED


def print_state(url: str, found: Any) -> None:
    """An artifact's state on stdout."""
    total = "?" if found.shards_total is None else found.shards_total
    rows = ", ".join(f"{count} {status}" for status, count in sorted(found.rows.items())) or "none"
    print(f"{url}: {found.stage}, {found.shards}/{total} shards committed, rows: {rows}")
    if found.journaled:
        print(f"  {found.journaled} more rows are finished in shards that are not committed yet")
    for shard, reason in found.quarantined.items():
        print(f"  shard {shard} quarantined: {reason}")
