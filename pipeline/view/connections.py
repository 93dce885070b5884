"""Limits on the viewer's connections: request and response timeouts, maximum number.

uvicorn closes a connection that is idle between two requests, but keeps one with an incomplete request forever.
"""

from __future__ import annotations

import asyncio

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guard import App

REQUEST_SECONDS = 10.0  # from connection or last response to the last header; over uvicorn's 5 s keep-alive
ANSWER_SECONDS = 600.0  # until a response is delivered
CONNECTIONS = 256  # a browser opens six


def server_of(app: App) -> uvicorn.Server:
    """A quiet server with bounded connections. Proxy headers are ignored: the client is the other end of the socket."""
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
    """uvicorn's protocol with deadlines. Beyond :data:`CONNECTIONS` the longest idle one is closed."""

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
            waiting = [peer for peer in self.connections if isinstance(peer, BoundedProtocol) and not peer.is_answering]
            oldest = min(waiting, key=lambda peer: peer._since)
            self.connections.discard(oldest)  # now: others may arrive before the loop reports that this one is gone
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _check(self) -> None:
        """Close a connection whose time is over, gracefully first: written data may still be in transit."""
        limit = self.answer_seconds if self.is_answering else self.request_seconds
        left = self._since + limit - self.loop.time()
        if self.transport.is_closing() or (left <= 0 and self.is_answering):
            self.transport.abort()
            return
        if left <= 0:
            self.transport.close()
        self._timer = self.loop.call_later(left if left > 0 else self.request_seconds, self._check)
