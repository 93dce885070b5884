"""Execution of a chain: each stage runs as a command in its own process; its state is saved before and after.

Stages resume by themselves, so a chain that was stopped, failed or killed continues with the same command. Output
invalidated by a change is removed before its stage starts, only in folders that this chain created; that is recorded
first, so that a kill at any moment leaves no stale output that would pass as valid.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ArtifactMismatch, BadInput
from ...manifests.files.names import linked_parent
from ...manifests.files.overwriting import refuse_overwriting
from ...manifests.files.redaction import redacted
from ...manifests.files.storage import Folder, remove
from ...models.child_processes import follow
from ..commands.run_job import LAST_WORDS, Exit
from ..inspect.chain_state import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    ChainState,
    StageState,
    copy_chain,
    load_chain,
    now,
    save_chain,
)
from ..runners.interrupts import CODES, interrupts
from .identity import product
from .lock import locked
from .plan import (
    Planned,
    arguments,
    artifact_folders,
    committed_rows,
    inspect_outputs,
    located,
    look,
    named_inputs,
    outputs,
    outside,
    shown_command,
    started_command,
    trustworthy,
    written,
)
from .recipe import Chain, ChainStage
from .skipped import has_marks, worked_on

Say = Callable[[str], None]


def run_chain(chain: Chain, folder: Path, say: Say) -> int:
    """Run the remaining stages; returns the exit code: 0 done, 130 stopped by Ctrl-C, else that of the failed stage."""
    with locked(folder, say) as lock:
        run = _Run(chain, folder, _state(chain, folder), say, lock)
        return run.go()


def _state(chain: Chain, folder: Path) -> ChainState:
    """The chain's state with the recipe's stages: known ones unchanged, new ones waiting."""
    store = redacted(chain.store)
    old = load_chain(folder) or ChainState(chain.name, now(), now(), store=store)
    if old.store != store:
        where = f"at {old.store}; give that as --artifacts" if old.store else "in it; leave --artifacts out"
        raise BadInput(f"{folder}: this chain's artifacts are {where}, or choose another --out")
    stages = []
    for stage in chain.stages:
        known = old.stage(stage.name)
        if known is None or known.stage != stage.command.name or known.out != stage.out:
            known = StageState(stage.name, stage.command.name, stage.out)
        if known.state == RUNNING:  # not running any more: this process has the lock
            known.state, known.seconds = STOPPED, None
        stages.append(known)
    return ChainState(chain.name, old.started, now(), stages, old.made, store)


@dataclass
class _Run:
    chain: Chain
    folder: Path
    state: ChainState
    say: Say
    lock: int
    stopping: bool = False

    def go(self) -> int:
        data = outside(self.chain)
        self._trust(look(self.chain, self.folder, self.state, data))
        planned = look(self.chain, self.folder, self.state, data)
        self._refuse_strangers(data)
        for stage in self.chain.stages:
            self._describe(stage, planned[stage.name])
        self._save()
        total = len(self.chain.stages)
        with interrupts(self._stop):
            for number, stage in enumerate(self.chain.stages, start=1):
                known = self._known(stage)
                plan = inspect_outputs(stage, self.folder, known, planned, data)
                planned[stage.name] = plan
                title = f"{number}/{total} {stage.name} ({stage.command.name})"
                if plan.settled:
                    self._describe(stage, plan)
                    self.say(f"== {title}: done before")
                    continue
                if self.stopping:
                    return Exit.INTERRUPTED
                why = f": {plan.verdict}, {plan.why}" if plan.why else ""
                self.say(f"== {title}{why}")
                code = self._stage(stage, plan, known)
                if known.state != DONE:
                    return code
                planned[stage.name] = replace(plan, verdict="done", product=known.product, origin=known.origin)
        self._save()  # some stages may have been found done
        return Exit.OK

    def _stop(self) -> None:
        self.stopping = True

    def _save(self) -> None:
        """Save the state, with a copy beside the artifacts for `status` and `report` there; nothing depends on it."""
        save_chain(self.folder, self.state)
        if self.chain.store:
            with suppress(OSError):
                copy_chain(Folder(self.chain.store), self.state)

    def _known(self, stage: ChainStage) -> StageState:
        known = self.state.stage(stage.name)
        assert known is not None
        return known

    def _trust(self, planned: dict[str, Planned]) -> None:
        """Accept an output that changed after it was done, if it passes verification; else refuse."""
        for stage in self.chain.stages:
            if planned[stage.name].verdict != "edited":
                continue
            url = outputs(stage, self.folder)[-1]
            faults = trustworthy(stage, self.folder)
            if faults:
                whole = located(stage, self.folder, stage.out)
                hint = f"restore it, or remove {whole} to have stage {stage.name} done again"
                raise ArtifactMismatch(f"{url}: not what stage {stage.name} made, and not sound: {faults[0]}; {hint}")
            self.say(f"{url}: changed since stage {stage.name} was done, but sound: its dependents are done again")
            known = self._known(stage)
            known.product, known.origin = product(outputs(stage, self.folder)), None

    def _refuse_strangers(self, read: Iterable[str]) -> None:
        """Raise BadInput if a stage would write into a folder with other files, or over data in ``read``."""
        read = list(read)
        for stage in self.chain.stages:
            url = located(stage, self.folder, stage.out)
            refuse_overwriting(url, read)
            if stage.out not in self.state.made and _is_taken(Folder(url)):
                text = f"{url}: holds something that this chain did not make"
                raise BadInput(f"{text}; move it away, or choose another --{'artifacts' if stage.store else 'out'}")

    def _describe(self, stage: ChainStage, plan: Planned) -> None:
        """Update a stage's entry in the state file. The inputs recorded at its start stay unchanged."""
        known = self._known(stage)
        known.inputs = named_inputs(stage)
        known.artifacts = artifact_folders(stage)
        known.arguments = arguments(self.chain, stage, self.folder)
        if plan.settled or plan.verdict == "goes on":
            known.config, known.digest = written(stage), plan.digest
        if plan.settled:
            known.state = DONE
        elif known.state == DONE:
            known.state = WAITING

    def _stage(self, stage: ChainStage, plan: Planned, known: StageState) -> int:
        """Run one stage until it ends or fails."""
        going_on = self._begin(stage, plan, known)
        known.state, known.error, known.started = RUNNING, None, now()
        self._save()
        words = [*known.arguments]
        if going_on and known_option(stage, "retry") and not stage.config.get("share"):
            words.append("--retry")
        self.say(f"$ {shown_command(stage, words)}")
        started = time.monotonic()
        code, last_words = self._command(started_command(stage, words))
        if known.seconds is not None:
            known.seconds = round(known.seconds + time.monotonic() - started, 1)
        if code != Exit.OK and self.stopping:  # whatever the code: torchrun and a killed command have their own
            code = Exit.INTERRUPTED
        known.state = DONE if code == Exit.OK else STOPPED if code in CODES else FAILED
        if known.state == DONE:
            known.product = product(outputs(stage, self.folder))
            known.origin = known.origin or known.product
            self._measure(stage, known)
        elif known.state == FAILED:
            known.error = redacted(last_words or _exit_text(code))
        self._save()
        if known.state == FAILED:
            hint = "fix that, and run the same command to resume"
            self.say(f"capipe: stage {stage.name} failed (exit code {code}): {known.error}; {hint}")
        return code if code > 0 else Exit.FAILED

    def _begin(self, stage: ChainStage, plan: Planned, known: StageState) -> bool:
        """Remove stale parts and record the inputs at the start; returns True if the stage continues instead."""
        assert plan.parts is not None
        going_on = known.begun == dict(plan.parts)
        if not going_on:
            stale = {name for name, mark in known.begun.items() if plan.parts.get(name) != mark}
            for part in stage.command.spec.parts:
                if part.name in stale and part.folder is not None:
                    self._clear(stage, part.folder)
            parts = [part for part in stage.command.spec.parts if part.name in known.begun]
            folders = {part.name for part in parts if part.folder is not None}
            whole = not known.begun or folders <= stale
            known.origin = None if not known.begun or folders & stale else known.origin or known.product
            known.seconds = 0.0 if whole else None
            if whole:
                known.measured = None
        known.begun, known.digest, known.config = dict(plan.parts), plan.digest, written(stage)
        known.product = None
        if stage.out not in self.state.made:
            self.state.made.append(stage.out)
        return going_on

    def _clear(self, stage: ChainStage, sub: str) -> None:
        if stage.out not in self.state.made:
            return
        if stage.store:
            folder = Folder(f"{stage.store}/{stage.out}/{sub}".rstrip("/"))
            if folder.names():
                self.say(f"removing {folder.url}, which was made of something else")
                folder.fs.remove(folder.path)
            return
        path = self.folder / stage.out / sub
        if path.exists():
            link = linked_parent(self.folder, str(path.relative_to(self.folder) / "-"))
            if link is not None:
                raise BadInput(
                    f"{link}: a symbolic link; remove what it leads to yourself: it was made of something else"
                )
            self.say(f"removing {path}, which was made of something else")
            remove(path)

    def _measure(self, stage: ChainStage, known: StageState) -> None:
        """Record rows and seconds of a finished stage, if all of its time is known."""
        if stage.recipe is not None:
            rows = stage.recipe.steps * stage.recipe.rollout.images
        elif known.artifacts:
            rows = sum((committed_rows(located(stage, self.folder, known.artifacts[-1])) or {}).values())
        else:
            rows = int(stage.config.get("images") or 0)
        if has_marks(stage):
            rows = worked_on(self.chain, stage, rows, self.folder) or 0
        if rows and known.seconds:
            known.measured = {"rows": rows, "seconds": known.seconds}

    def _command(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a command in its own session; returns its exit code and its last message.

        A Ctrl-C in the terminal then reaches only this process, and is forwarded once per press.
        """
        with tempfile.TemporaryDirectory() as scratch:
            last = Path(scratch) / "said"
            process = subprocess.Popen(
                command,
                env={**os.environ, LAST_WORDS: str(last)},
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=functools.partial(follow, os.getpid()),
            )
            code = self._wait(process)
            return code, last.read_text(encoding="utf-8").strip() if last.exists() else ""

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        passed_on = False
        try:
            while True:
                try:
                    return process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    if self.stopping and not passed_on:
                        self.say("stopping: the running stage finishes what it has begun")
                        process.send_signal(signal.SIGINT)
                        passed_on = True
        except KeyboardInterrupt:  # second Ctrl-C
            process.send_signal(signal.SIGINT)
            process.wait()
            return Exit.INTERRUPTED


def _is_taken(folder: Folder) -> bool:
    """True if anything is there: a file, or a folder that is not empty."""
    if folder.is_local and Path(folder.path).is_dir():
        return bool(folder.names())
    return folder.exists()


def known_option(stage: ChainStage, name: str) -> bool:
    """True if a stage's command has an option that the chain sets."""
    return name in inspect.signature(stage.command.function).parameters


def _exit_text(code: int) -> str:
    if code == Exit.UNRESOLVED:
        return "rows or shards of it are to be tried again; the same command does that"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return "its own message is above"
