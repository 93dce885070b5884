"""What data may say to lead elsewhere, and where that leads: shared by the tests of doors."""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

from capipe.manifests.files.outside import Reach

from ..conftest import photo
from .ingesting import fill

A, B, C = photo(1), photo(2, fmt="PNG"), photo(3, fmt="WEBP")
SECRET = "the secret key"


class Pictures(BaseHTTPRequestHandler):
    """A server that has one picture at every address; ``seen``: what it was asked for."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        type(self).seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(A)))
        self.end_headers()
        self.wfile.write(A)

    def log_message(self, *_: object) -> None:
        pass


def hostile(folder: Path, server: str) -> dict[str, str]:
    """What a row may say that is never opened, with the reason in words."""
    os.mkfifo(folder / "pipe.jpg")
    fill(folder, {"evil.json": b'{"version": 1, "refs": {"k": ["' + server.encode() + b'/evil"]}}'})
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "environ.jpg").symlink_to("/proc/self/environ")
    return {
        "reference://k::evil.json": "a chain of file systems",
        f"simplecache::{server}/chained": "a chain of file systems",
        f"zip://a.jpg::{server}/a.zip": "a chain of file systems",
        "simplecache::/etc/hostname": "a chain of file systems",
        f"file://{folder}/a.jpg": "URLs of file: are not opened from data",
        "memory://x/a.jpg": "URLs of memory: are not opened from data",
        "ftp://127.0.0.1/a.jpg": "URLs of ftp: are not opened from data",
        "pipe.jpg": "not a regular file",
        "/dev/zero": "hold no data",
        "/dev/stdin": "hold no data",
        "/proc/self/environ": "hold no data",
        "//proc/self/environ": "hold no data",
        "/sys/kernel/notes": "hold no data",
        "../" * 40 + "proc/self/environ": "hold no data",
        "zero.jpg": "not a regular file",
        "environ.jpg": "hold no data",
        "a\0.jpg": "a zero byte",
        "a" * 10_000: "no path or URL",
        ".": "not a regular file",
    }


def reach(within: Path) -> Reach:
    return Reach(within=str(within))
