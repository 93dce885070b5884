"""HTTP requests within bounds: a deadline from first to last byte, and a limit on the decompressed size.

httpx alone has a timeout for each read, which a slow trickle of bytes never hits, and decompresses whatever arrives.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from ..base import RequestError

MOST_BYTES = 16 << 20  # of a decompressed response
ENCODINGS = "gzip, deflate"  # that zlib decompresses incrementally
_UNPACKED = (b"content-encoding", b"content-length", b"transfer-encoding")  # headers that describe the compressed body

Got = TypeVar("Got")


class TooLarge(RequestError):
    """A response larger than any request here can have."""

    def __init__(self, message: str = f"the server's answer is over {MOST_BYTES >> 20} MB") -> None:
        super().__init__(message)


async def exchange(
    client: httpx.AsyncClient, method: str, url: str, timeout_s: float, body: Any = None
) -> httpx.Response:
    """The response, read and decompressed; redirects are returned, not followed.

    Raises httpx.HTTPError (ReadTimeout where it is not complete within ``timeout_s``), and RequestError for one that is
    too large or compressed in a way that was not asked for.
    """
    request = client.stream(method, url, json=body, headers={"accept-encoding": ENCODINGS}, follow_redirects=False)
    try:
        async with asyncio.timeout(timeout_s), request as response:
            content = await _content(response)
    except TimeoutError:
        raise httpx.ReadTimeout(f"no whole answer within {timeout_s:g} s") from None
    headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _UNPACKED]
    return httpx.Response(response.status_code, headers=headers, content=content, request=response.request)


async def _content(response: httpx.Response) -> bytes:
    unpacking = Unpacking(response.headers.get("content-encoding", ""))
    content = bytearray()
    async for piece in response.aiter_raw():
        content += unpacking.add(piece)
    unpacking.finish()
    return bytes(content)


class Unpacking:
    """Incremental decompression of a body, to at most ``most`` bytes."""

    def __init__(self, encoding: str, most: int = MOST_BYTES) -> None:
        self._encoding, self._most = encoding.strip().lower(), most
        if self._encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise RequestError(f"the server's answer is packed by {encoding[:40]!r}, where {ENCODINGS} was asked for")
        self._unpacker: Any = None
        self._packed = self._size = 0

    def add(self, piece: bytes) -> bytes:
        """Decompress a piece. Raises TooLarge, and httpx.DecodingError for invalid data."""
        self._packed += len(piece)
        if self._encoding not in ("", "identity") and piece:
            self._unpacker = self._unpacker or zlib.decompressobj(self._window(piece))
            try:
                piece = self._unpacker.decompress(piece, self._most - self._size + 1)
            except zlib.error as error:
                raise httpx.DecodingError(f"the answer broke on its way: {error}") from None
        self._size += len(piece)
        if max(self._packed, self._size) > self._most:
            raise TooLarge
        return piece

    def finish(self) -> None:
        """Raises httpx.DecodingError where the end is missing."""
        if self._unpacker is not None and not self._unpacker.eof:
            raise httpx.DecodingError("the answer broke on its way: its end is missing")

    def _window(self, piece: bytes) -> int:
        """zlib's window bits; "deflate" is sent with zlib's header and, by some, without."""
        if self._encoding != "deflate":
            return 16 + zlib.MAX_WBITS
        headed = piece[0] & 0x0F == 8 and int.from_bytes(piece[:2], "big") % 31 == 0
        return zlib.MAX_WBITS if headed else -zlib.MAX_WBITS


def run_apart(work: Coroutine[Any, Any, Got]) -> Got:
    """The result of a coroutine, run in another thread, for code that may itself run in an event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
