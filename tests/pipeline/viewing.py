"""The viewer as tests ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from capipe.pipeline.view.app import create_app
from capipe.pipeline.view.library import Library
from capipe.pipeline.view.server import guarded


def client_of(folder: Path, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    app = guarded(create_app(Library(folder)), host, 8642, token)
    return TestClient(app, base_url=f"http://{host}:8642", follow_redirects=False)


def get(client: TestClient, path: str, code: int = 200, **parameters: Any) -> dict[str, Any]:
    response = client.get(f"/api/{path}", params=parameters)
    assert response.status_code == code, response.text
    assert response.headers["cache-control"] == "no-store"
    found: dict[str, Any] = response.json()
    return found


def all_rows(client: TestClient, limit: int = 4, **parameters: Any) -> list[dict[str, Any]]:
    """Every row, page after page."""
    found: list[dict[str, Any]] = []
    at: dict[str, Any] = {}
    while True:
        page = get(client, "rows", limit=limit, **parameters, **at)
        found += page["rows"]
        if page["after"] is None:
            return found
        at = {"shard": page["after"][0], "row": page["after"][1]}
