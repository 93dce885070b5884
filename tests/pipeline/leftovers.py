"""Commands in a session of their own, and what is left of them: no process, however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from capipe.pipeline.runners.local import WORKER_NAME

MARK = "CAPIPE_TEST_COMMAND"
SECONDS = 10.0  # for everything to be gone


@dataclass(frozen=True)
class Member:
    """A live process of a command. ``name`` and ``command`` as the system shows them."""

    pid: int
    parent: int
    name: str
    command: str


class Watched:
    """A running command. All that it starts has its mark in the environment, or is of its session (vLLM's processes
    write their names over their environment)."""

    def __init__(self, command: Sequence[object], log: IO[str], cwd: Path | None = None) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        environ = {**staged_environment(), name: value}
        words = [str(word) for word in command]
        self._log = log
        self.process = subprocess.Popen(
            words, env=environ, start_new_session=True, stdout=log, stderr=log, cwd=cwd, preexec_fn=_hear_all
        )

    @property
    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def members(self) -> list[Member]:
        """What lives of it, the command itself included; zombies do not."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "stat").read_text(errors="replace")
                environ = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it ended meanwhile, or is another user's
            name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            ours = fields[3] == str(self.process.pid) or self._mark.encode() in environ.split(b"\0")
            if ours and fields[0] not in "ZX":
                found.append(Member(int(folder.name), int(fields[1]), name, command))
        return found

    def wait_for(self, sought: Callable[[Member], bool], seconds: float = 120) -> Member:
        """The first member of that kind."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said
            if found := [each for each in self.members() if sought(each)]:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no such process: {self.members()}\n{self.said}")

    def gone(self, rays: float = SECONDS) -> float:
        """Seconds until no process is left. Fails after :data:`SECONDS`; after ``rays`` where only Ray's own are."""
        started = time.monotonic()
        while left := self.members():
            limit = rays if all(map(is_rays, left)) else SECONDS
            assert time.monotonic() - started < limit, f"still there: {left}\n{self.said}"
            time.sleep(0.05)
        return time.monotonic() - started

    def kill_all(self) -> None:
        """For the end of a test that failed."""
        for each in self.members():
            os.kill(each.pid, 9)
        self.process.wait()


def _hear_all() -> None:
    """As a command in a terminal does: tests that run under `nohup`, or with `&`, ignore some, and so would what they
    start."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def is_rays(member: Member) -> bool:
    """Whether it is one of Ray's own processes, no actor of ours and no engine."""
    return "ray" in member.command and "RayWorker" not in member.command and not is_engine(member)


def is_engine(member: Member) -> bool:
    """Whether it is one of vLLM's processes that has its name, which they get once they have imported vLLM."""
    return member.name.startswith("VLLM")


def is_spawned(member: Member) -> bool:
    """Whether it is one of vLLM's processes, with its name or as it was spawned."""
    return is_engine(member) or "spawn_main" in member.command


def is_worker(member: Member) -> bool:
    return member.command.endswith(f" {WORKER_NAME}")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def staged(**options: object) -> list[str]:
    """The command of a run of :mod:`.staged_run`, to be started in :func:`staged_environment`."""
    return [sys.executable, "-c", "from tests.pipeline import staged_run; staged_run.main()", json.dumps(options)]


def staged_environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
