"""A chat server whose answers a test writes, over real sockets on 127.0.0.1."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from capipe.models.engines.base import ChoiceRequest, EngineDead, GenerationRequest, Prompt, RequestError, Sampling
from capipe.models.engines.http.engine import HTTPOptions, connect_http_engine

Answer = tuple[int, dict[str, str], Any]
ASK = GenerationRequest(Prompt("Describe."), Sampling(max_tokens=7, seed=3))


def completion(text: str, finish_reason: str = "stop", logprobs: Any = None) -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason, "logprobs": logprobs}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 4}}


class Double:
    """A chat server whose answer to the n-th completion is ``answers(n, body)``; it keeps what it was sent."""

    def __init__(self, answers: Callable[[int, dict[str, Any]], Answer | None], owner: str = "vllm") -> None:
        self.answers, self.owner = answers, owner
        self.model, self.status = "captioner", 200  # what /models tells
        self.workers = 1  # what vLLM's /get_world_size tells
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.open = threading.Event()  # set when the server closes: lets handlers that never answer go

    def handler(self) -> type[BaseHTTPRequestHandler]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listed = [{"id": double.model, "owned_by": double.owner}, {"id": "other"}]
                self.reply(double.status, {}, {"data": listed, "world_size": double.workers})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])) or "{}")
                double.paths.append(self.path)
                double.times.append(time.monotonic())
                double.headers.append({name.lower(): value for name, value in self.headers.items()})
                double.bodies.append(body)
                answer = double.answers(len(double.bodies) - 1, body)
                if answer is None:
                    double.open.wait(30)
                    self.close_connection = True
                else:
                    self.reply(*answer)

            def reply(self, status: int, headers: dict[str, str], content: Any) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        return Handler


class Listener(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True


@contextmanager
def serving(double: Double, port: int = 0) -> Iterator[str]:
    server = Listener(("127.0.0.1", port), double.handler())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        double.open.set()
        server.shutdown()
        server.server_close()
        thread.join()


def options(url: str, **changes: Any) -> HTTPOptions:
    return replace(HTTPOptions(url, timeout_s=5.0, attempts=3, backoff_s=0.01), **changes)


async def ask(double: Double, request: GenerationRequest | ChoiceRequest = ASK, **changes: Any) -> Any:
    """One request to the double: its completion or scores, or what it raised."""
    with serving(double) as url:
        engine = await connect_http_engine(options(url, **changes))
        try:
            if isinstance(request, ChoiceRequest):
                return await engine.choose(request)
            return await engine.generate(request)
        except (RequestError, EngineDead) as error:
            return error
        finally:
            await engine.aclose()
