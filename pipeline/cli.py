"""The command line. Each command checks its options, runs its job, prints the result and sets the exit code.

Exit codes: 0 all done and every row's fate is final; 1 done, but rows or shards are to be tried again, or verification
found faults; 2 something given cannot be used; 3 the run could not go on; 130 stopped by Ctrl-C, 143 by SIGTERM, 129
by SIGHUP, to be resumed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from .. import __version__
from ..errors import CapipeError, Problems
from ..manifests.files.redaction import redact_output, redacted
from ..manifests.import_path import is_import_path
from ..terminal import escape_logs, escaped, print_err, print_line
from .chain import command
from .commands import eval, inspect
from .commands.options.shared import Images, local_path
from .commands.run_job import LAST_WORDS, Exit
from .runners.worker import disk_text
from .specs import STAGES, command_of, stage_spec


class Commands(TyperGroup):
    """The built-in commands, and custom stages by import path: ``capipe my_package.my_module:SPEC``."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if not is_import_path(cmd_name):
            return super().get_command(ctx, cmd_name)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(command_of(stage_spec(cmd_name)))
        return typer.main.get_command(single)


app = typer.Typer(
    name="capipe",
    cls=Commands,
    help="Caption datasets for pretraining vision-language models: image shards in, verified captions out.\n\n"
    + (__doc__ or "").split("\n\n", 1)[1],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line: errors for users become one line on stderr and their exit code.

    A KeyboardInterrupt exits with the code of Ctrl-C; :mod:`.__main__` reports it, and knows which signal it was.
    """
    escape_logs()
    redact_output()
    try:
        app()
    except Problems as error:
        for line in error.lines:
            _end_with(line)
        raise SystemExit(error.exit_code) from None
    except CapipeError as error:
        _end_with(str(error))
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # a full disk, missing permissions: a traceback would not help
        _end_with(disk_text(error))
        raise SystemExit(Exit.FAILED) from None


for _spec in STAGES.values():
    app.command(_spec.name)(command_of(_spec))
app.command()(eval.compare)
app.command()(command.run)
app.command()(inspect.status)
app.command()(inspect.report)
app.command()(inspect.view)


def _end_with(line: str) -> None:
    """Report why a command ends, also to the chain that runs it."""
    line = redacted(line)
    print_err(f"capipe: {line}")
    if file := os.environ.get(LAST_WORDS):
        Path(file).write_text(line, encoding="utf-8", errors="backslashreplace")


@app.command()
def verify(
    artifact: Annotated[str, typer.Argument(help="Folder or URL of an artifact; with --absent, of anything.")],
    images: Images = None,
    absent: Annotated[
        str | None,
        typer.Option(
            "--absent",
            metavar="FILE",
            help="Instead: prove that no image of these uids is there. A list as of --drop: one uid per line, or "
            "FILE.parquet[:COLUMN].",
        ),
    ] = None,
) -> None:
    """Re-read every checksum, count and key of an artifact, and compare its rows with its input's."""
    from .inspect.verify import verify as check

    if absent is not None:
        if images:
            raise typer.BadParameter("--images is where other tars may be read, and --absent reads none; leave it out")
        raise typer.Exit(_verify_absent(artifact, absent))
    report = check(artifact, images or ())
    for note in report.notes:
        print_line(f"note: {note}")
    for fault in report.faults:
        print_line(f"fault: {fault}")
    rows = ", ".join(f"{count} {status}" for status, count in sorted(report.rows.items())) or "no rows"
    verdict = f"{len(report.faults)} faults" if report.faults else "clean"
    print_line(f"{artifact}: {verdict}; {report.shards} shards, {report.bytes:,} bytes, {rows}")
    raise typer.Exit(Exit.UNRESOLVED if report.faults else Exit.OK)


def _verify_absent(folder: str, given: str) -> Exit:
    from ..manifests.withdrawal.uid_set import read_uids
    from .inspect.verify import verify_absent

    uids = read_uids(given)
    report, notes = verify_absent(folder, uids)
    for note in notes:
        print_line(f"note: {note}")
    for fault in report.faults:
        print_line(f"fault: {fault}")
    if report.more:
        print_line(f"fault: … and {report.more:,} more")
    count = len(report.faults) + report.more
    verdict = f"{count:,} faults" if count else "absent"
    read = f"{report.files:,} files, {report.bytes:,} bytes, {report.rows:,} withdrawn rows of them"
    print_line(f"{folder}: {verdict}; {len(uids):,} uids in {given}; {read}")
    return Exit.UNRESOLVED if count else Exit.OK


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to fill.", parser=local_path)] = Path("demo"),
    images: Annotated[int, typer.Option(min=3, help="Rendered images.")] = 400,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
    train_steps: Annotated[int, typer.Option(min=0, help="Steps of training; 0 trains nothing.")] = 12,
) -> None:
    """Run the chain of `recipes/tiny.yaml`: render, ask, train, caption, filter, export; verify and print results."""
    from .chain.demo import run_demo
    from .report.demo import lines

    code, report = run_demo(out, images, engine, train_steps, print_line)
    if code == Exit.OK:
        for line in ("", *lines(report)):
            print_line(line)
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Show engines, devices and versions found, what is missing, and how to get it."""
    from .commands.doctor import run_checks

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    findings = run_checks()
    for finding in findings:
        mark = "ok" if finding.mend is None else ("MISSING" if finding.required else "-")
        text = finding.found + (f"  ->  {finding.mend}" if finding.mend else "")
        table.add_row(mark, *(Text(escaped(cell)) for cell in (finding.name, text)))
    Console(soft_wrap=True).print(table)
    raise typer.Exit(Exit.UNRESOLVED if any(f.mend and f.required for f in findings) else Exit.OK)


@app.command()
def version() -> None:
    """Print the version."""
    print_line(__version__)
