"""End of a command: its exit code, and the summary of the artifact that it wrote."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from rich.console import Console

from ...manifests.artifact import Artifact
from ...manifests.status import Status
from ...stages.ingest.shard import STAGE as INGEST
from ...terminal import print_err, print_line
from ..inspect.status import State, state
from ..inspect.status_view import artifact_lines
from ..jobs.artifacts import marks_line
from ..jobs.rows.engine import StagePlan, execute
from ..runners.interrupts import say
from ..runners.placement import Placement
from ..runners.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from ...manifests.withdrawal.uid_set import UidSet
    from ..jobs.withdraw import PassedOn

LONGEST_REASON = 200  # characters of a row's reason on the console
LAST_WORDS = "CAPIPE_LAST_WORDS"  # environment variable: file for the last message of a command in a chain


class Exit(IntEnum):
    """Exit codes, explained in the docstring of :mod:`..cli`, which `capipe --help` shows."""

    OK = 0
    UNRESOLVED = 1
    BAD_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130


def run_job(made: StagePlan, workplace: Placement) -> Exit:
    """Execute a plan with a progress display, release its output, and print the result."""
    try:
        if made.todo and (line := marks_line(made.shards)):
            print_err(line)
        progress = progress_of(made)
        with progress.shown(Console(stderr=True)) as report:
            outcome = execute(made, report, workplace)
    finally:
        made.artifact.close()
    return conclude(made.artifact.url, outcome.interrupted, progress.finished_line())


def run_withdrawing(
    made: StagePlan, placement: Placement, drop: UidSet | None, schema: pa.Schema, passed_on: PassedOn
) -> Exit:
    """:func:`run_job` of a stage with ``--drop``: rows of listed images are withdrawn from committed shards first."""
    from ..jobs.withdraw import withdraw

    withdrawal = withdraw(made.artifact, drop, schema, passed_on)
    code = Exit.INTERRUPTED if withdrawal is None else run_job(made, placement)
    if withdrawal is not None and (line := withdrawal.line()):
        print_err(line)
    return code


def progress_of(made: StagePlan) -> Progress:
    """The progress display for a plan: totals from the input's manifest, and progress of earlier runs."""
    records = [shard.record for shard in made.shards]
    known = [record.count for record in records if record is not None]
    total = sum(known) if len(known) == len(records) else None
    before = sum(record.count for record in made.artifact.committed().values())
    done = len(made.shards) - len(made.todo)
    return Progress(made.stage.name, len(made.shards), done, total, before)


def conclude(out: str, interrupted: bool, line: str) -> Exit:
    """Print a run's last lines and return its exit code."""
    result = state(out)
    print_err(line)
    print_state(out, result)
    if interrupted and not result.complete:
        say("stopped; run the same command to go on")
        return Exit.INTERRUPTED
    if failed := result.rows[Status.ENGINE_ERROR]:
        hint = "fix what can be fixed, then add --retry to do them again"
        print_err(f"{failed} rows ended in engine_error{_why(out, Status.ENGINE_ERROR)}; {hint}")
    if unread := result.rows[Status.READ_ERROR]:
        hint = "fix what their error says (a share, a server, memory), and run the same command: it tries them again"
        if result.stage != INGEST:
            hint += "; where their images were never ingested, run `capipe ingest` first"
        print_err(f"{unread} rows ended in read_error{_why(out, Status.READ_ERROR)}; {hint}")
    return Exit.OK if result.complete else Exit.UNRESOLVED


def _why(out: str, status: Status) -> str:
    reason = first_error(out, status)
    return f" (the first: {reason})" if reason else ""


def first_error(out: str, status: Status) -> str:
    """Error of the first row with an unresolved ``status``, shortened: it shows whether retrying helps."""
    artifact = Artifact.open(out)
    shard = next((name for name, record in artifact.committed().items() if record.rows.get(status)), None)
    if shard is None:
        return ""
    rows = artifact.table(shard, ["status", "error"]).to_pylist()
    reason = next((row["error"] or "" for row in rows if row["status"] == status), "")
    return " ".join(reason.split())[:LONGEST_REASON]


def print_state(url: str, found: State) -> None:
    """Print an artifact's state to stdout."""
    for line, _ in artifact_lines(url, found):
        print_line(line)
