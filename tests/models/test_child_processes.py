"""Children end with their parent, whatever they are doing; and who else has a device is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from capipe.models.child_processes import descendants, end, first_words
from capipe.models.engines.vllm.device_holders import device_holders, orphaned_engines
from capipe.models.engines.vllm.environment import prepare_environment

# A process that spawns one that spawns one, as vLLM's do, each of which then hangs where no handler is called.
NESTED = """
    import multiprocessing, sys, time
    from pathlib import Path

    def hang(folder, depth):
        Path(folder, str(depth)).touch()
        if depth:
            multiprocessing.get_context("spawn").Process(target=hang, args=(folder, depth - 1)).start()
        import ctypes
        ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock

    def main():
        from capipe.models.child_processes import spawned_follow
        with spawned_follow():
            process = multiprocessing.get_context("spawn").Process(target=hang, args=(sys.argv[1], 1))
            process.start()
        process.join()
"""


def test_what_is_spawned_follows_from_its_first_line_on(tmp_path: Path) -> None:
    (tmp_path / "nested.py").write_text(textwrap.dedent(NESTED))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    head = subprocess.Popen([sys.executable, "-c", "import nested; nested.main()", str(tmp_path)], env=environ)
    deadline = time.monotonic() + 60
    while not (tmp_path / "0").exists():
        assert head.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    family = descendants(head.pid)
    assert len(family) >= 2  # and multiprocessing's resource tracker
    head.kill()
    head.wait()
    deadline = time.monotonic() + 10
    while alive := {pid for pid, _ in family if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def test_a_family_is_found_and_ended(tmp_path: Path) -> None:
    """One ends when it is waited for, one is killed, one was never of it."""
    command = "trap '' TERM; sleep 0.3 & sleep 600 & wait"
    head, other = subprocess.Popen(["bash", "-c", command]), subprocess.Popen(["sleep", "600"])
    while len(descendants(head.pid)) < 2:
        time.sleep(0.02)
    family = descendants(head.pid)
    end(family, grace=0.1)
    assert descendants(head.pid) == set() and head.wait(5) == 0
    assert other.poll() is None
    other.kill()
    other.wait()
    end({(other.pid, "1")})  # gone, or another process by now: nothing is done


@pytest.fixture
def orphan(tmp_path: Path) -> int:
    """A process that is called as vLLM's are and whose parent is gone."""
    program = tmp_path / "VLLM::EngineCor"
    shutil.copy(shutil.which("sleep") or "", program)
    script = f"'{program}' 60 >/dev/null 2>&1 & echo $!"
    return int(subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout)


def test_an_engine_that_was_left_on_a_device_is_named(orphan: int) -> None:
    try:
        parent = int(Path(f"/proc/{orphan}/stat").read_text().rpartition(") ")[2].split()[1])
        if parent != 1:
            pytest.skip("here orphans have another parent than the first process")
        assert (orphan, "VLLM::EngineCor") in orphaned_engines()
        assert f"pid {orphan} (VLLM::EngineCor, an engine whose owner is gone)" in device_holders(on_gpu=False)
        device_holders(on_gpu=True)  # where there is no driver it has nothing to tell, and raises nothing
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_vllm_spawns_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    prepare_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_what_a_killed_process_leaves_is_removed_without_a_word() -> None:
    """multiprocessing's tracker would warn after the command's last line, which is to be the reason of its end."""
    code = f"{first_words()} import multiprocessing, os; kept = multiprocessing.get_context('spawn').Semaphore()"
    command = [sys.executable, "-c", f"{code}; os.kill(os.getpid(), 9)"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)  # until the tracker has ended, too
    assert process.returncode == -signal.SIGKILL and process.stderr == ""
