"""A folder of pictures; a server that counts, and a folder of private things."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from ..conftest import photo
from .hostile import SECRET, C, Pictures
from .ingesting import fill


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(25):
        (root / f"{number:02d}.jpg").write_bytes(photo(number))
        (root / f"{number:02d}.txt").write_text(f"picture {number}")
    return root


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Pictures, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of private things, outside of every source."""
    return fill(tmp_path / "home", {"private.jpg": C, "key": SECRET.encode(), "creds.json": b'{"token": "secret"}'})
