"""What engines say of their context, and what is asked of servers that say nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from capipe.models.context_check import context_of
from capipe.models.engines.base import Prompt
from capipe.models.engines.loading import EngineConfig, load_engine


@contextmanager
def listing(**models: int | None) -> Iterator[str]:
    """A server that lists models with their contexts and does nothing else."""
    data = [{"id": name, "owned_by": "vllm", "max_model_len": length} for name, length in models.items()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


async def test_a_server_tells_the_context_of_the_model_that_is_asked() -> None:
    with listing(small=1024, large=4096) as url:
        assert (context_of(EngineConfig(url)), context_of(EngineConfig(url, "large"))) == (1024, 4096)
        engine = await load_engine(EngineConfig(url, "large"))
        assert engine.context == 4096 and await engine.count_tokens(Prompt("Which?")) is None
        await engine.aclose()
    with listing(m=None) as url:
        assert context_of(EngineConfig(url)) is None
        engine = await load_engine(EngineConfig(url))
        assert engine.context is None
        await engine.aclose()


async def test_of_several_servers_the_shortest_counts() -> None:
    with listing(m=1024) as first, listing(m=2048) as second, listing(m=None) as silent:
        assert context_of(EngineConfig(f"{second},{first},{silent}", "m")) == 1024
        engine = await load_engine(EngineConfig(f"{second},{first},{silent}", "m"))
        assert engine.context == 1024
        await engine.aclose()


@pytest.mark.parametrize(("asked", "context"), [(None, 2048), (300, 300)])
async def test_an_engine_of_ours_knows_its_context_and_its_tokens(asked: int | None, context: int) -> None:
    engine = await load_engine(EngineConfig("transformers", "tiny/reader", max_model_len=asked))
    counts = [await engine.count_tokens(Prompt(text)) for text in ("", " star", " star star")]
    assert engine.context == context and None not in counts
    assert [count - (counts[0] or 0) for count in counts if count is not None] == [0, 1, 2]
    await engine.aclose()
