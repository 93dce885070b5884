"""Small data made on the spot. Nothing here reaches a network beyond loopback."""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from .storing import StoreProxy, proxied

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for commands, too: tiny models are no faster with two, and often slower


SHARED = ("vllm_engine",)  # session fixtures that several files use, and that take long to start


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test` has twelve minutes; `make test-all` leaves nothing out."""
    parser.addoption("--quick", action="store_true", help="leave out tests marked slow, and kill less often in trials")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests in a quick run."""
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n 2`), keep a file's tests in one of them, and files that share a fixture in the same.

    Not by `--dist loadgroup`: xdist 3.8 names groups in node ids, which pytest 9.2 does not let it change.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((name for name in SHARED if name in _parameters(config.rootpath / file)), file)

    return ByFile(config, log)


@functools.cache
def _parameters(file: Path) -> frozenset[str]:
    """Words of a file that can be parameters."""
    return frozenset(re.findall(r"\b(\w+): ", file.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def kills(pytestconfig: pytest.Config) -> Callable[[int], int]:
    """How often a trial kills: as many times as asked for, half as often in a quick run."""
    return lambda wanted: (wanted + 1) // 2 if pytestconfig.getoption("--quick") else wanted


def photo(seed: int, size: tuple[int, int] = (96, 64), fmt: str = "JPEG") -> bytes:
    """A smooth random picture, encoded."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(out, fmt)
    return out.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch and journals of remote artifacts: of each test's own, not in the home of whoever runs it."""
    monkeypatch.setenv("CAPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar_bytes(members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    """A tar as Python's own tarfile writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar under ``tmp_path`` and return its path."""

    def make(members: Mapping[str, bytes] | list[tuple[str, bytes]], name: str = "in/00000.tar") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members))
        return path

    return make


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on a real S3 server (moto's) on loopback; boto reads its address from the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProxy]:
    """The same server behind a proxy that misbehaves on request; the address that boto reads is the proxy's."""
    with proxied(monkeypatch, os.environ["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy
