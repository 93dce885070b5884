"""`capipe status` in lines: an artifact, a training run or a whole folder, once or live."""

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
from ...terminal import escaped
from ..runners.progress import clock
from .chain_state import DONE, FAILED, STOPPED, ChainState, StageState
from .discover import HERE, Found, find
from .status import RunState, State, run_state, state, state_of

_FRESH = 120.0  # seconds: what was written later than this is taken to be under way
_STYLES = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow", "damaged": "red"}


@dataclass
class Overview:
    """The states of a folder's parts by name. ``alone``: the folder is one artifact or run."""

    url: str
    alone: bool
    artifacts: dict[str, State] = field(default_factory=dict)
    runs: dict[str, RunState] = field(default_factory=dict)
    chain: ChainState | None = None
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Nothing is to be waited for. A chain knows best: a stage that has not begun has no folder yet."""
        if self.chain is not None:
            return all(stage.state in (DONE, FAILED, STOPPED) for stage in self.chain.stages)
        return all(each.complete for each in self._parts())

    def _parts(self) -> list[State | RunState]:
        return [*self.artifacts.values(), *self.runs.values()]

    def as_json(self) -> dict[str, Any]:
        """One artifact's or run's own figures, or all of them by name."""
        if self.alone:
            return next(each.as_json() for each in self._parts())
        stages = None if self.chain is None else [_stage_json(each) for each in self.chain.stages]
        return {
            "chain": None if self.chain is None else {"recipe": self.chain.recipe, "stages": stages},
            "artifacts": {name: each.as_json() for name, each in self.artifacts.items()},
            "training": {name: each.as_json() for name, each in self.runs.items()},
            "damaged": self.damaged,
            "complete": self.complete,
        }


def _stage_json(stage: StageState) -> dict[str, Any]:
    shown = ("name", "stage", "state", "seconds", "error")
    return {**{key: getattr(stage, key) for key in shown}, "artifacts": list(stage.artifacts)}


def overview(url: str) -> Overview:
    """Read a folder or URL. Raises BadInput where it holds nothing of capipe."""
    folder = Path(url)
    if "://" in url or not folder.is_dir():
        return Overview(url, True, artifacts={HERE: state(url)})
    found = find(folder)
    view = Overview(url, _alone(found), chain=found.chain, damaged=dict(found.damaged))
    for name, artifact in found.artifacts.items():
        try:
            view.artifacts[name] = state_of(artifact)
        except (CapipeError, OSError) as error:
            view.damaged[name] = str(error)
    view.runs = {name: run_state(run) for name, run in found.runs.items()}
    if view.alone and not (view.artifacts or view.runs):
        raise CapipeError(next(iter(view.damaged.values())))
    return view


def _alone(found: Found) -> bool:
    """Whether the folder itself is its only artifact or run."""
    named = [*found.artifacts, *found.runs, *found.damaged]
    return found.chain is None and named == [HERE]


# --- lines -----------------------------------------------------------------------------------------------------------


def lines(view: Overview) -> Iterator[tuple[str, str]]:
    """The overview, line by line, each with a rich style."""
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
        found = artifact_lines(name, view.artifacts[name])
    elif name in view.runs:
        found = run_lines(name, view.runs[name])
    else:
        return
    yield from ((indent + text, style) for text, style in found)


def shards_committed(count: int, total: int | None) -> str:
    """Progress of an artifact. Its input may have fewer shards by now than it has itself."""
    if total is not None and count > total:
        return f"{count} shards committed, of an input that has {total} now"
    return f"{count}/{'?' if total is None else total} shards committed"


def artifact_lines(name: str, found: State) -> Iterator[tuple[str, str]]:
    """An artifact: shards and rows, then throughput, unfinished rows, quarantined shards."""
    rows = ", ".join(f"{count} {status}" for status, count in sorted(found.rows.items())) or "none"
    yield f"{name}: {found.stage}, {shards_committed(found.shards, found.shards_total)}, rows: {rows}", ""
    if found.shards != found.shards_total and found.rate is not None:
        seen = sum(found.rows.values()) + found.journaled
        share = f"{seen} of {found.rows_total} rows, " if found.rows_total else ""
        yield f"  {share}{found.rate:.1f} rows/s, ETA {clock(found.eta)}{_idle(found.idle)}", "cyan"
    if found.journaled:
        yield f"  {found.journaled} more rows are finished in shards that are not committed yet", ""
    for shard, reason in found.quarantined.items():
        yield f"  shard {shard} quarantined: {reason}", "red"


def run_lines(name: str, found: RunState) -> Iterator[tuple[str, str]]:
    """A training run: steps, reward, tokens; throughput while it runs; the last validation."""
    reward = "" if found.reward is None else f", reward {found.reward:.3f}"
    tokens = "" if found.tokens is None else f", {found.tokens:.1f} tokens a caption"
    kept = f", checkpoint {found.checkpoint}" if found.checkpoint else ", no checkpoint yet"
    yield f"{name}: training, step {found.step}/{found.steps or '?'}{reward}{tokens}{kept}", ""
    if found.rate is not None:
        yield f"  {1 / found.rate:.1f} s a step, ETA {clock(found.eta)}{_idle(found.idle)}", "cyan"
    if found.validation:
        yield "  validation: " + ", ".join(f"{key} {value:.3f}" for key, value in found.validation.items()), ""


def _idle(seconds: float | None) -> str:
    return "" if seconds is None or seconds < _FRESH else f"; nothing was finished for {clock(seconds)}"


# --- again and again -------------------------------------------------------------------------------------------------


def follow(look: Callable[[], Overview], every: float, console: Console) -> Overview:
    """Show it anew until all is done: in place on a terminal, else whenever a line changes. Returns the last look.

    Ctrl-C ends it (KeyboardInterrupt).
    """
    shown: list[str] = []
    with Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else _Plain() as live:
        while True:
            view = look()
            told = [(text, style) for text, style in lines(view)]
            if isinstance(live, Live):
                live.update(Group(*(Text(escaped(text), style, no_wrap=True) for text, style in told)), refresh=True)
            else:
                for text, _ in told:
                    if text not in shown:
                        console.print(Text(escaped(text)), soft_wrap=True)
                shown = [text for text, _ in told]
            if view.complete:
                return view
            time.sleep(every)


class _Plain:
    """Stands where a live display would, for output that is no terminal."""

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None: ...
