"""What withdrawals are checked by: states of a folder before and after, lists, and a command killed at every step."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from capipe.manifests.withdrawal.absent import prove_absent
from capipe.manifests.withdrawal.uid_set import UidSet
from capipe.pipeline.inspect.verify import verify

from ..stages.exporting import VERSIONED

UNKNOWN = "0" * 31 + "1"
PRIVATE = ("manifest.jsonl", "times.jsonl", "lock", "guard", "config.json")  # they tell the history, too

# The n-th time that something becomes visible or goes (a rename, a removal, a manifest line) is where a process dies;
# another one then ends its work. Both are forks of one that has imported everything and done nothing yet, and each n
# starts from a copy of the same folder. Prints how often it died.
_DIES = """
import hashlib, itertools, os, shutil, signal, sys
from capipe.manifests import manifest
from capipe.manifests.files import storage
from capipe.pipeline.jobs import annotate, export, select, withdraw
from capipe.pipeline.report import filter
from capipe.pipeline.cli import main
before, killed, first, stride = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.argv = ["capipe", *sys.argv[5:]]
left = 0
def dying(function):
    def called(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return called
for name in ("publish", "publish_tree", "remove"):
    setattr(storage.Folder, name, dying(getattr(storage.Folder, name)))
manifest.append = dying(manifest.append)
def run(step):
    global left
    left = step
    child = os.fork()
    if child == 0:
        main()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for step in itertools.count(first, stride):
    shutil.rmtree(killed, ignore_errors=True)
    shutil.copytree(before, killed)
    code = run(step)
    if code != -signal.SIGKILL:
        break
    code = run(0)
    print("killed", step, code, flush=True)
    os.rename(killed, f"{killed}-{step}")
print("ended", code)
"""


def killed_at_steps(before: Path, killed: Path, *arguments: object, first: int = 1, stride: int = 1) -> list[Path]:
    """Run a command on copies of ``before`` in the place ``killed``: each dies at one step and is then run to its end.

    Returns the folders so made, one for each of the command's steps from ``first`` in strides.
    """
    command = [sys.executable, "-c", _DIES, before, killed, first, stride, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    *lines, end = done.stdout.splitlines()
    steps = [line.split() for line in lines if line.startswith("killed ")]
    assert end == "ended 0" and {code for _, _, code in steps} == {"0"}, (done.stdout, done.stderr)
    return [killed.with_name(f"{killed.name}-{step}") for _, step, _ in steps]


def marks(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of every file."""
    return {
        str(path.relative_to(folder)): (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and (facts := path.stat())
    }


def touched(before: dict[str, tuple[int, int, int]], after: dict[str, tuple[int, int, int]]) -> set[str]:
    """Shards (numbers) with a file that is new, gone or another one."""
    names = [name for name in before | after if not {*VERSIONED} & {*name.split("/")}]  # which have random numbers
    changed = {name for name in names if before.get(name) != after.get(name)}
    return {shard for name in changed for shard in re.findall(r"(?<!\d)(\d{5})(?!\d)", name)[:1]}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell the history."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in PRIVATE and path.parent.name not in VERSIONED
    }


def listed(file: Path, uids: Iterable[str]) -> Path:
    file.write_text("".join(f"{uid}\n" for uid in uids))
    return file


def is_clean(folder: Path | str, uids: Iterable[str]) -> bool:
    """True if an artifact is sound and has nothing of some images but rows that say so."""
    report = prove_absent(str(folder), UidSet.of(uids))
    assert report.faults == [] and verify(str(folder)).faults == [], (report.faults, verify(str(folder)).faults)
    return report.rows > 0
