"""Image decoding in a pool of processes, so that the engine's process spends none of its time (nor its GIL) on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import BadInput, RunFailed
from ..manifests.status import Status
from .engine import ImageGrid
from .formats import ImageProblem
from .images import ImageLimits, Pixels, decode_rgb, grid_size, is_plain, plain_copy
from .processes import Worker, WorkerDiedError

Result = TypeVar("Result")
Batch = Sequence[bytes]

SECONDS_PER_IMAGE = 60.0  # a decoder that takes longer than this is stuck
_CHECK_GRID = ImageGrid(factor=28, min_pixels=28 * 28, max_pixels=28 * 28)  # very small: only whether it is sound
_BATCH_IMAGES = 16  # small images share a message: at 112 pixels a message costs a good part of a decode
_BATCH_BYTES = 256 << 10


def decode_batch(
    images: Batch, *, decode: Callable[[bytes], Result | ImageProblem]
) -> tuple[list[Result | ImageProblem], float]:
    """Runs in the worker; one result per image, and the seconds they took. An image's fault becomes its problem."""
    started = time.perf_counter()
    results: list[Result | ImageProblem] = []
    for data in images:
        try:
            results.append(decode(data))
        except Exception as error:  # a decoder's bug, or memory: the row says so, the others go on
            results.append(ImageProblem(Status.CORRUPT, f"cannot be decoded: {type(error).__name__}: {error}"))
    return results, time.perf_counter() - started


def grid_decoder(
    grid: ImageGrid, limits: ImageLimits, *, dct_scaling: bool = True
) -> Callable[[bytes], Pixels | ImageProblem]:
    """Decoding to a vision-language model's pixel grid, for a pool. Raises BadInput where no size fits the grid."""
    try:
        grid_size(grid.factor, grid.factor, grid)
    except ValueError as error:
        raise BadInput(f"the model's pixel limits cannot be met: {error}") from None
    return functools.partial(decode_rgb, grid=grid, limits=limits, dct_scaling=dct_scaling)


def check_for_server(data: bytes, *, limits: ImageLimits) -> bytes | ImageProblem:
    """What to send a server instead of a sound image's own bytes; empty where it gets those."""
    small = decode_rgb(data, _CHECK_GRID, limits)
    if isinstance(small, ImageProblem):
        return small
    return b"" if is_plain(data) else plain_copy(data, limits)


@dataclass(frozen=True, slots=True)
class _Job(Generic[Result]):
    data: bytes
    future: asyncio.Future[Result | ImageProblem]


class DecodePool(Generic[Result]):
    """Runs ``decode`` on images in ``workers`` processes. At most ``in_flight`` images wait or are worked on at once.

    ``decode`` must be importable there: a module's function, or a partial of one with picklable arguments.

    An image that kills its decoder fails alone: that process is replaced, and images that shared its message are tried
    again one by one. Use from one event loop; ``busy_seconds`` ÷ (workers × wall time) is how busy decoding is.
    """

    def __init__(
        self, workers: int, decode: Callable[[bytes], Result | ImageProblem], *, in_flight: int | None = None
    ) -> None:
        self._function = functools.partial(decode_batch, decode=decode)
        self.workers = workers
        self.busy_seconds = 0.0
        self._slots = asyncio.Semaphore(in_flight or 2 * _BATCH_IMAGES * workers)
        self._jobs: queue.SimpleQueue[_Job[Result] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._lanes = [_Lane(self) for _ in range(workers)]

    async def decode(self, data: bytes) -> Result | ImageProblem:
        """What ``decode`` makes of the image, or why nothing. Raises RunFailed where no worker starts."""
        async with self._slots:
            if self._closed:
                raise RunFailed("the decoding pool is closed")
            future: asyncio.Future[Result | ImageProblem] = asyncio.get_running_loop().create_future()
            self._jobs.put(_Job(data, future))
            return await future

    def close(self) -> None:
        """Stop the processes at once; what still waits fails with RunFailed."""
        self._closed = True
        for lane in self._lanes:
            lane.kill()
        for _ in self._lanes:
            self._jobs.put(None)
        for lane in self._lanes:
            lane.thread.join()
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                _settle([job], RunFailed("the decoding pool is closed"))

    def _take(self) -> list[_Job[Result]] | None:
        """Jobs for one message: never more than a fair share, so that no lane idles beside a long message."""
        job = self._jobs.get()
        if job is None:
            return None
        jobs, size = [job], len(job.data)
        share = min(_BATCH_IMAGES, 1 + self._jobs.qsize() // (2 * self.workers))
        while len(jobs) < share and size < _BATCH_BYTES:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # the sign to stop is for everyone; these jobs come first
                break
            jobs.append(job)
            size += len(job.data)
        return jobs

    def _count(self, seconds: float) -> None:
        with self._lock:
            self.busy_seconds += seconds


class _Lane(Generic[Result]):
    """One thread and its process: takes jobs, hands them over, settles their futures."""

    def __init__(self, pool: DecodePool[Result]) -> None:
        self._pool, self._worker = pool, Worker(pool._function)
        self.thread = threading.Thread(target=self._run, name="capipe-decode", daemon=True)
        self.thread.start()

    def kill(self) -> None:
        self._worker.kill()

    def _run(self) -> None:
        broken = self._await_start()
        while (jobs := self._pool._take()) is not None:
            if self._pool._closed:
                broken = broken or RunFailed("the decoding pool is closed")
            if broken is None:
                try:
                    self._decode(jobs)
                    continue
                except RunFailed as error:
                    broken = error
            _settle(jobs, broken)
        self._worker.close()

    def _await_start(self) -> RunFailed | None:
        try:
            self._worker.wait_ready()
        except Exception as error:  # a failed import can be anything; it fails the run, not an image
            return RunFailed(f"an image decoding process did not start: {error}")
        return None

    def _decode(self, jobs: list[_Job[Result]]) -> None:
        try:
            self._worker.send([job.data for job in jobs])
            results, seconds = self._worker.recv(timeout=SECONDS_PER_IMAGE * len(jobs))
        except WorkerDiedError as death:
            self._replace()
            if len(jobs) == 1:
                _settle(jobs, [ImageProblem(Status.CORRUPT, f"the decoder crashed on this image: {death}")])
                return
            for job in jobs:
                self._decode([job])
            return
        self._pool._count(seconds)
        _settle(jobs, results)

    def _replace(self) -> None:
        if self._pool._closed:
            raise RunFailed("the decoding pool is closed")
        self._worker.kill()
        self._worker = Worker(self._pool._function)
        if (broken := self._await_start()) is not None:
            raise broken


def _settle(jobs: Sequence[_Job[Result]], outcome: Sequence[Result | ImageProblem] | Exception) -> None:
    """Hand results (or one error to all) to the futures, in their own loop and with one wake-up of it."""

    def deliver() -> None:
        for index, job in enumerate(jobs):
            if job.future.done():  # its caller was cancelled
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome[index])

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        jobs[0].future.get_loop().call_soon_threadsafe(deliver)
