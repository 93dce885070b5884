"""The decoding pool: the same pixels as in this process, and a killer image hurts nobody else."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capipe.errors import BadInput, RunFailed
from capipe.manifests.status import Status
from capipe.models.images import decode_pool as decode_module
from capipe.models.images.decode import ImageLimits, decode_rgb, plain_copy
from capipe.models.images.decode_pool import DecodePool, check_for_server, grid_decoder
from capipe.models.images.formats import ImageProblem
from capipe.models.images.grid import ImageGrid

from ...conftest import photo

GRID = ImageGrid(28, 56 * 56, 112 * 112)
LIMITS = ImageLimits()

# A decoder that does what its input says: runs in the worker processes, so it has to be a module they can import.
CRASHY = """
    import os, signal, time
    import numpy as np

    def decode(data, grid, limits, dct_scaling):
        if data == b"segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.startswith(b"once ") and not os.path.exists(data[5:]):
            open(data[5:], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if data.startswith(b"slow"):
            time.sleep(0.2)
        if data == b"exit":
            os._exit(7)
        if data == b"hang":
            time.sleep(60)
        if data == b"raise":
            raise MemoryError("too much")
        if data == b"bug":
            raise KeyError("size")
        return np.full((2, 2, 3), data[0], np.uint8)
"""


@pytest.fixture
async def pool() -> AsyncIterator[DecodePool]:
    made = DecodePool(2, grid_decoder(GRID, LIMITS))
    yield made
    made.close()


@pytest.fixture
def crashy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every pool of this test decode with :data:`CRASHY`."""
    (tmp_path / "crashy_decoder.py").write_text(textwrap.dedent(CRASHY))
    monkeypatch.syspath_prepend(tmp_path)
    import crashy_decoder  # type: ignore[import-not-found]

    monkeypatch.setattr(decode_module, "decode_rgb", crashy_decoder.decode)


async def test_pixels_and_problems_are_those_of_a_direct_call(pool: DecodePool) -> None:
    images = [photo(seed, (200 + seed, 150)) for seed in range(20)] + [
        photo(1, fmt="PNG"),
        b"",
        b"<html>",
        photo(2)[:-9],
    ]
    results = await asyncio.gather(*(pool.decode(data) for data in images))
    for data, result in zip(images, results, strict=True):
        expected = decode_rgb(data, GRID, LIMITS)
        if isinstance(expected, ImageProblem):
            assert result == expected
        else:
            assert isinstance(result, np.ndarray) and (result == expected).all()
            assert result.flags.writeable
    assert pool.busy_seconds > 0


async def test_what_a_server_is_to_get() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    out = io.BytesIO()
    Image.open(io.BytesIO(photo(1))).save(out, "JPEG", exif=exif)
    pool = DecodePool(1, functools.partial(check_for_server, limits=LIMITS))
    try:
        assert await pool.decode(photo(1)) == b""
        assert await pool.decode(out.getvalue()) == plain_copy(out.getvalue(), LIMITS) != out.getvalue()
        cut = await pool.decode(out.getvalue()[:-30])
        assert isinstance(cut, ImageProblem) and cut.status is Status.CORRUPT
    finally:
        pool.close()


async def test_large_arrays_come_through_whole() -> None:
    grid = ImageGrid(4, 16, 10**7)
    pool = DecodePool(1, grid_decoder(grid, LIMITS))
    try:
        result = await pool.decode(photo(3, (2000, 1500)))
        expected = decode_rgb(photo(3, (2000, 1500)), grid, LIMITS)
        assert isinstance(result, np.ndarray) and isinstance(expected, np.ndarray)
        assert result.nbytes == 9_000_000 and (result == expected).all()
    finally:
        pool.close()


@pytest.mark.usefixtures("crashy")
@pytest.mark.parametrize(("killer", "how"), [(b"segfault", "SIGSEGV"), (b"exit", "code 7")])
async def test_an_image_that_kills_its_decoder_fails_alone(killer: bytes, how: str) -> None:
    pool = DecodePool(1, grid_decoder(GRID, LIMITS))
    try:
        jobs = [killer if number % 10 == 5 else bytes([number]) for number in range(60)]
        results = await asyncio.gather(*(pool.decode(data) for data in jobs))
        for data, result in zip(jobs, results, strict=True):
            if data == killer:
                assert isinstance(result, ImageProblem) and result.status is Status.READ_ERROR  # never `corrupt`
                assert "tried 2 times: the decoder died" in result.reason and how in result.reason
            else:
                assert isinstance(result, np.ndarray) and (result == data[0]).all()
    finally:
        pool.close()


@pytest.mark.usefixtures("crashy")
async def test_a_decoder_that_raises_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "SECONDS_PER_IMAGE", 0.5)
    pool = DecodePool(1, grid_decoder(GRID, LIMITS))
    try:
        raised = await pool.decode(b"raise")
        reason = "cannot be decoded now, tried 2 times: out of memory: too much"
        assert raised == ImageProblem(Status.READ_ERROR, reason)
        assert await pool.decode(b"bug") == ImageProblem(Status.CORRUPT, "cannot be decoded: KeyError: 'size'")
        hung = await pool.decode(b"hang")
        assert isinstance(hung, ImageProblem) and hung.status is Status.READ_ERROR
        assert "no answer within 0.5 s" in hung.reason
        assert isinstance(await pool.decode(b"\x05"), np.ndarray)
    finally:
        pool.close()


@pytest.mark.usefixtures("crashy")
@pytest.mark.parametrize("beside", [0, 3])
async def test_an_image_whose_decoder_is_killed_once_is_decoded(tmp_path: Path, beside: int) -> None:
    """As the kernel does where memory runs out: a real SIGKILL, which says nothing of the image."""
    pool = DecodePool(1, grid_decoder(GRID, LIMITS))
    try:
        killed = f"once {tmp_path / 'died'}".encode()
        jobs = [bytes([7]), killed, *[bytes([number]) for number in range(beside)]]
        results = await asyncio.gather(*(pool.decode(data) for data in jobs))
        assert (tmp_path / "died").exists()
        for data, result in zip(jobs, results, strict=True):
            assert isinstance(result, np.ndarray) and (result == data[0]).all()
    finally:
        pool.close()


@pytest.mark.usefixtures("crashy")
async def test_all_decoders_killed_three_times(tmp_path: Path) -> None:
    """Whatever was under them is decoded, or to be tried again; the rest is decoded."""
    pool = DecodePool(2, grid_decoder(GRID, LIMITS))
    try:
        jobs = [b"slow%d" % number for number in range(40)]
        waiting = asyncio.gather(*(pool.decode(data) for data in jobs))
        for _ in range(3):
            await asyncio.sleep(0.5)
            for lane in pool._lanes:
                os.kill(lane.decoder._worker.pid, signal.SIGKILL)
        results = await waiting
        failed = [result for result in results if isinstance(result, ImageProblem)]
        assert {result.status for result in failed} <= {Status.READ_ERROR} and len(failed) <= 6
        assert len(failed) < len(results)
    finally:
        pool.close()


@pytest.mark.usefixtures("crashy")
async def test_images_in_flight_are_bounded() -> None:
    pool = DecodePool(1, grid_decoder(GRID, LIMITS), in_flight=3)
    try:
        waiting = [asyncio.create_task(pool.decode(b"hang")) for _ in range(10)]
        await asyncio.sleep(0.5)
        assert pool._slots.locked()
        assert pool._jobs.qsize() <= 3
        for task in waiting:
            task.cancel()
    finally:
        pool.close()


@pytest.mark.usefixtures("crashy")
async def test_close_is_prompt_and_fails_what_waits() -> None:
    pool = DecodePool(2, grid_decoder(GRID, LIMITS))
    waiting = [asyncio.create_task(pool.decode(b"hang")) for _ in range(8)]
    await asyncio.sleep(0.5)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, RunFailed) for result in results), results
    with pytest.raises(RunFailed):
        await pool.decode(b"\x01")


async def test_a_worker_that_cannot_start_blames_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = DecodePool(1, grid_decoder(GRID, LIMITS))
    try:
        with pytest.raises(RunFailed, match="did not start"):
            await pool.decode(photo(1))
    finally:
        pool.close()


def test_impossible_pixel_limits_are_refused() -> None:
    with pytest.raises(BadInput, match="widen the model's pixel limits"):
        grid_decoder(ImageGrid(28, 12_500, 12_500), LIMITS)


def test_workers_import_no_torch_and_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"  # without an `if __name__` guard: workers must not import it
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            from capipe.models.worker_process import Worker
            import worker_side

            worker = Worker(worker_side.modules)
            worker.wait_ready()
            worker.send(None)
            print(worker.pid, *worker.recv(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    (tmp_path / "worker_side.py").write_text(
        "import sys\nimport capipe.models.images.decode_pool\ndef modules(_):\n"
        "    return [m for m in ('torch', 'transformers', 'datasets', 'pandas') if m in sys.modules]\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    pid, *heavy = ran.stdout.split()
    assert heavy == []
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():  # dead, and nobody there to collect it
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists(), f"worker {pid} outlived its parent {os.getpid()}"
