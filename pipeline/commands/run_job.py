"""How a command ends: its exit code, and what it says of the artifact it worked on."""

from __future__ import annotations

from enum import IntEnum

from rich.console import Console

from ...manifests.artifact import Artifact
from ...manifests.status import Status
from ...stages.ingest.shard import STAGE as INGEST
from ...terminal import print_err, print_line
from ..inspect.status import State, state
from ..inspect.status_view import artifact_lines
from ..jobs.engine import StagePlan, execute
from ..runners.interrupts import say
from ..runners.placement import Placement
from ..runners.progress import Progress

LONGEST_REASON = 200  # characters of a row's reason on the console
LAST_WORDS = "CAPIPE_LAST_WORDS"  # names a file to which a command in a chain repeats the line it ends with


class Exit(IntEnum):
    """See the text of :mod:`..cli`, which is also what `capipe --help` shows."""

    OK = 0
    UNRESOLVED = 1
    BAD_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130


def run_job(made: StagePlan, workplace: Placement) -> Exit:
    """Do a plan under its progress display, give its output back, say what came of it."""
    try:
        progress = progress_of(made)
        with progress.shown(Console(stderr=True)) as report:
            outcome = execute(made, report, workplace)
    finally:
        made.artifact.close()
    return conclude(made.artifact.url, outcome.interrupted, progress.finished_line())


def progress_of(made: StagePlan) -> Progress:
    """The progress display for a plan: totals known from the input's manifest, and what earlier runs did."""
    records = [shard.record for shard in made.shards]
    known = [record.count for record in records if record is not None]
    total = sum(known) if len(known) == len(records) else None
    before = sum(record.count for record in made.artifact.committed().values())
    done = len(made.shards) - len(made.todo)
    return Progress(made.stage.name, len(made.shards), done, total, before)


def conclude(out: str, interrupted: bool, line: str) -> Exit:
    """Print a run's last lines and choose its exit code."""
    found = state(out)
    print_err(line)
    print_state(out, found)
    if interrupted and not found.complete:
        say("stopped; run the same command to go on")
        return Exit.INTERRUPTED
    if failed := found.rows[Status.ENGINE_ERROR]:
        mend = "mend what can be mended, then add --retry to do them again"
        print_err(f"{failed} rows ended in engine_error{_why(out, Status.ENGINE_ERROR)}; {mend}")
    if unread := found.rows[Status.READ_ERROR]:
        mend = "mend what their error says (a share, a server, memory), and run the same command: it tries them again"
        if found.stage != INGEST:
            mend += "; where their images were never ingested, run `capipe ingest` first"
        print_err(f"{unread} rows ended in read_error{_why(out, Status.READ_ERROR)}; {mend}")
    return Exit.OK if found.complete else Exit.UNRESOLVED


def _why(out: str, status: Status) -> str:
    reason = first_error(out, status)
    return f" (the first: {reason})" if reason else ""


def first_error(out: str, status: Status) -> str:
    """Why an artifact's first row of an unresolved ``status`` is one, in short: it shows whether trying again helps."""
    artifact = Artifact.open(out)
    shard = next((name for name, record in artifact.committed().items() if record.rows.get(status)), None)
    if shard is None:
        return ""
    rows = artifact.table(shard, ["status", "error"]).to_pylist()
    reason = next((row["error"] or "" for row in rows if row["status"] == status), "")
    return " ".join(reason.split())[:LONGEST_REASON]


def print_state(url: str, found: State) -> None:
    """An artifact's state on stdout."""
    for line, _ in artifact_lines(url, found):
        print_line(line)
