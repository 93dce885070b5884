"""The command line. Each command checks its options, hands them on, prints what came of it and sets the exit code.

Exit codes: 0 all done and every row's fate is final; 1 done, but rows or shards are to be tried again, or verification
found faults; 2 something given cannot be used; 3 the run could not go on; 130 stopped by Ctrl-C, to be resumed.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..errors import CapipeError
from . import caption_cli, dedup_cli, embed_cli, eval_cli, export_cli, filter_cli, look_cli, quiz_cli, train_cli
from .interrupts import interrupts
from .options import Fresh, Out, validated
from .outcome import Exit, conclude
from .worker import disk_text

app = typer.Typer(
    name="capipe",
    help="Caption datasets for pretraining vision-language models: image shards in, verified captions out.\n\n"
    + (__doc__ or "").split("\n\n", 1)[1],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


app.command()(embed_cli.embed)
app.command()(dedup_cli.dedup)
app.command()(quiz_cli.qa)
app.command()(train_cli.train)
app.command()(caption_cli.annotate)
app.command("filter")(filter_cli.filter_)
app.command()(export_cli.export)
app.command("eval")(eval_cli.evaluate)
app.command()(eval_cli.compare)
app.command()(look_cli.status)
app.command()(look_cli.report)
app.command()(look_cli.view)


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
def demo(
    out: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=3, help="Rendered pictures.")] = 400,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
    train_steps: Annotated[int, typer.Option(min=0, help="Steps of training; 0 trains nothing.")] = 12,
) -> None:
    """Render pictures, ingest and caption them, write a quiz, evaluate, train, verify all of it, and say what came."""
    from .demo import run_demo
    from .demo_report import lines

    report = run_demo(out, images, engine, train_steps, lambda text: print(f"\n== {text}", flush=True))
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
