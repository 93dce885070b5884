"""Text output of `capipe status`: an artifact, a training run or a whole folder, once or live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ...errors import CapipeError
from ...manifests.files.outside import is_url
from ...terminal import escaped
from ..runners.progress import clock
from .chain_state import DONE, FAILED, STOPPED, ChainState, StageState
from .discover import HERE, Found, find
from .status import RunState, State, run_state, state, state_of

_FRESH = 120.0  # seconds without a write before a part counts as idle
_STYLES = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow", "damaged": "red"}


@dataclass
class Overview:
    """States of a folder's parts, by name. ``alone``: the folder is a single artifact or run."""

    url: str
    alone: bool
    artifacts: dict[str, State] = field(default_factory=dict)
    runs: dict[str, RunState] = field(default_factory=dict)
    chain: ChainState | None = None
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to wait for. A chain, if any, decides: a stage that has not begun has no folder."""
        if self.chain is not None:
            return all(stage.state in (DONE, FAILED, STOPPED) for stage in self.chain.stages)
        return all(part.complete for part in self._parts())

    def _parts(self) -> list[State | RunState]:
        return [*self.artifacts.values(), *self.runs.values()]

    def as_json(self) -> dict[str, Any]:
        """Counts of a single artifact or run, or of all parts by name."""
        if self.alone:
            return next(part.as_json() for part in self._parts())
        stages = None if self.chain is None else [_stage_json(stage) for stage in self.chain.stages]
        return {
            "chain": None if self.chain is None else {"recipe": self.chain.recipe, "stages": stages},
            "artifacts": {name: artifact.as_json() for name, artifact in self.artifacts.items()},
            "training": {name: run.as_json() for name, run in self.runs.items()},
            "damaged": self.damaged,
            "complete": self.complete,
        }


def _stage_json(stage: StageState) -> dict[str, Any]:
    shown = ("name", "stage", "state", "seconds", "error")
    return {**{key: getattr(stage, key) for key in shown}, "artifacts": list(stage.artifacts)}


def overview(url: str) -> Overview:
    """Read a folder or URL. Raises BadInput if it holds nothing of capipe."""
    if not is_url(url) and not Path(url).is_dir():
        return Overview(url, True, artifacts={HERE: state(url)})
    contents = find(url)
    view = Overview(url, _alone(contents), chain=contents.chain, damaged=dict(contents.damaged))
    for name in list(contents.artifacts):
        artifact = contents.artifacts.pop(name)  # of many shards, it takes some hundred megabytes
        try:
            view.artifacts[name] = state_of(artifact)
        except (CapipeError, OSError) as error:
            view.damaged[name] = str(error)
    view.runs = {name: run_state(run) for name, run in contents.runs.items()}
    if view.alone and not (view.artifacts or view.runs):
        raise CapipeError(next(iter(view.damaged.values())))
    return view


def _alone(contents: Found) -> bool:
    """Whether the folder is itself its only artifact or run."""
    named = [*contents.artifacts, *contents.runs, *contents.damaged]
    return contents.chain is None and named == [HERE]


# --- lines -----------------------------------------------------------------------------------------------------------


def lines(view: Overview) -> Iterator[tuple[str, str]]:
    """Lines of the overview, each with a rich style."""
    if view.alone:
        for artifact in view.artifacts.values():
            yield from artifact_lines(view.url, artifact)
        for run in view.runs.values():
            yield from run_lines(view.url, run)
        return
    rest = {*view.artifacts, *view.runs}
    if view.chain is not None:
        done = sum(stage.state == DONE for stage in view.chain.stages)
        yield f"{view.url}: {view.chain.recipe}, {done}/{len(view.chain.stages)} stages done", "bold"
        for stage in view.chain.stages:
            yield from _stage_lines(view, stage)
            rest -= {*stage.artifacts, stage.out}
    for name in [*view.artifacts, *view.runs]:
        if name in rest:
            yield from _part_lines(view, name, "")
    for name, reason in view.damaged.items():
        yield f"{name}: {reason}", _STYLES["damaged"]


def _stage_lines(view: Overview, stage: StageState) -> Iterator[tuple[str, str]]:
    took = "" if stage.seconds is None else f" in {clock(stage.seconds)}"
    yield f"{stage.state:>8}  {stage.name} ({stage.stage}){took}", _STYLES.get(stage.state, "dim")
    if stage.error:
        yield f"          {stage.error}", _STYLES[FAILED]
    for name in dict.fromkeys((*stage.artifacts, stage.out)):
        yield from _part_lines(view, name, " " * 10)


def _part_lines(view: Overview, name: str, indent: str) -> Iterator[tuple[str, str]]:
    if name in view.artifacts:
        part = artifact_lines(name, view.artifacts[name])
    elif name in view.runs:
        part = run_lines(name, view.runs[name])
    else:
        return
    yield from ((indent + text, style) for text, style in part)


def shards_committed(count: int, total: int | None) -> str:
    """Progress of an artifact. Its input may by now have fewer shards than the artifact."""
    if total is not None and count > total:
        return f"{count} shards committed, of an input that has {total} now"
    return f"{count}/{'?' if total is None else total} shards committed"


def artifact_lines(name: str, counts: State) -> Iterator[tuple[str, str]]:
    """Lines about an artifact: shards and rows, then throughput, unfinished rows, quarantined shards."""
    rows = ", ".join(f"{count} {status}" for status, count in sorted(counts.rows.items())) or "none"
    yield f"{name}: {counts.stage}, {shards_committed(counts.shards, counts.shards_total)}, rows: {rows}", ""
    if counts.shards != counts.shards_total and counts.rate is not None:
        seen = sum(counts.rows.values()) + counts.journaled
        share = f"{seen} of {counts.rows_total} rows, " if counts.rows_total else ""
        yield f"  {share}{counts.rate:.1f} rows/s, ETA {clock(counts.eta)}{_idle(counts.idle)}", "cyan"
    if counts.journaled:
        yield f"  {counts.journaled} more rows are finished in shards that are not committed yet", ""
    for shard, reason in counts.quarantined.items():
        yield f"  shard {shard} quarantined: {reason}", "red"


def run_lines(name: str, run: RunState) -> Iterator[tuple[str, str]]:
    """Lines about a training run: steps, reward, tokens; throughput while it runs; last validation."""
    reward = "" if run.reward is None else f", reward {run.reward:.3f}"
    tokens = "" if run.tokens is None else f", {run.tokens:.1f} tokens a caption"
    kept = f", checkpoint {run.checkpoint}" if run.checkpoint else ", no checkpoint yet"
    yield f"{name}: training, step {run.step}/{run.steps or '?'}{reward}{tokens}{kept}", ""
    if run.rate is not None:
        yield f"  {1 / run.rate:.1f} s a step, ETA {clock(run.eta)}{_idle(run.idle)}", "cyan"
    if run.best:
        yield f"  best checkpoint: {run.best}", ""
    if run.validation:
        yield "  validation: " + ", ".join(f"{key} {value:.3f}" for key, value in run.validation.items()), ""


def _idle(seconds: float | None) -> str:
    return "" if seconds is None or seconds < _FRESH else f"; nothing was finished for {clock(seconds)}"


# --- following -------------------------------------------------------------------------------------------------------


def follow(look: Callable[[], Overview], every: float, console: Console) -> Overview:
    """Refresh until all is done: in place on a terminal, else whenever a line changes. Returns the last overview.

    Ctrl-C ends it (KeyboardInterrupt).
    """
    shown: list[str] = []
    with Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else _Plain() as live:
        while True:
            view = look()
            styled = [(text, style) for text, style in lines(view)]
            if isinstance(live, Live):
                live.update(Group(*(Text(escaped(text), style, no_wrap=True) for text, style in styled)), refresh=True)
            else:
                for text, _ in styled:
                    if text not in shown:
                        console.print(Text(escaped(text)), soft_wrap=True)
                shown = [text for text, _ in styled]
            if view.complete:
                return view
            time.sleep(every)


class _Plain:
    """Placeholder for the live display if the output is not a terminal."""

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None: ...
