"""The viewer's connections: none waits for its request for ever, and there are only so many of them.

uvicorn ends a connection that is silent between two requests; one whose request never becomes whole it keeps for ever.
"""

from __future__ import annotations

import asyncio

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guard import App

REQUEST_SECONDS = 10.0  # from the connection, or the answer before, to the last header; over uvicorn's 5 s of silence
ANSWER_SECONDS = 600.0  # until an answer is with whoever asked
CONNECTIONS = 256  # a browser opens six


def server_of(app: App) -> uvicorn.Server:
    """A server for the app, quiet and with bounded connections; who asks is the other end, whatever headers say."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    return uvicorn.Server(config)


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines. Beyond :data:`CONNECTIONS` the one that has waited longest makes room."""

    request_seconds, answer_seconds, most = REQUEST_SECONDS, ANSWER_SECONDS, CONNECTIONS
    _since = 0.0
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._timer = self.loop.call_later(self.request_seconds, self._check)
        if len(self.connections) > self.most:
            waiting = [each for each in self.connections if isinstance(each, BoundedProtocol) and not each.is_answering]
            oldest = min(waiting, key=lambda each: each._since)
            self.connections.discard(oldest)  # now: others may come before the loop says that this one is gone
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _check(self) -> None:
        """End the connection where its time is over, first politely: what was written may still be on its way."""
        limit = self.answer_seconds if self.is_answering else self.request_seconds
        left = self._since + limit - self.loop.time()
        if self.transport.is_closing() or (left <= 0 and self.is_answering):
            self.transport.abort()
            return
        if left <= 0:
            self.transport.close()
        self._timer = self.loop.call_later(left if left > 0 else self.request_seconds, self._check)
