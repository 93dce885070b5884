"""A Hugging Face hub on loopback: repositories of bytes, by commit; it notes what was fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """``commits``: files by (repository, commit); ``refs``: the commit of (repository, branch or tag)."""

    commits: dict[tuple[str, str], Files] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, files: Files, *refs: str) -> str:
        """A commit, where ``refs`` point to from now on; returns its name."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.commits[repo, commit] = files
        self.refs |= {(repo, ref): commit for ref in refs or ("main",)}
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, (what, *ref) = "/".join(parts[2:4]), parts[4:] or ["revision", "main"]
            commit = self._commit(repo, "/".join(ref))
            if commit is None:
                return self._unknown(repo)
            files = self.commits[repo, commit]
            if what == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
                ]
                return 200, {}, json.dumps(tree).encode()
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
        if parts[2:3] != ["resolve"]:
            return 404, {}, b""
        repo, ref, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        commit = self._commit(repo, ref)
        if commit is None:
            return self._unknown(repo)
        found = self.commits[repo, commit].get(name)
        if found is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_oid(found)}"'}, found

    def _commit(self, repo: str, ref: str) -> str | None:
        return ref if (repo, ref) in self.commits else self.refs.get((repo, ref))

    def _unknown(self, repo: str) -> tuple[int, dict[str, str], bytes]:
        known = any(each == repo for each, _ in self.commits)
        return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(body=True)

        def do_HEAD(self) -> None:
            self._send(body=False)

        def _send(self, body: bool) -> None:
            status, headers, data = hub.answer(self.path)
            if body and "/resolve/" in self.path and status == 200:
                hub.fetched.append(self.path.rsplit("/resolve/", 1)[1].split("/", 1)[1])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
