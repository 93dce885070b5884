"""Image decoding in a pool of processes, so that it takes no time (nor the GIL) of the engine's process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeGuard, TypeVar

from ...errors import BadInput, RunFailed
from ...manifests.status import Status
from ..worker_process import Worker, WorkerDiedError
from .decode import ImageLimits, Pixels, decode_rgb, grid_size, is_plain, plain_copy
from .formats import ImageProblem
from .grid import ImageGrid

Result = TypeVar("Result")
Batch = Sequence[bytes]

SECONDS_PER_IMAGE = 60.0  # a decoder that takes longer than this is stuck
_CHECK_GRID = ImageGrid(factor=28, min_pixels=28 * 28, max_pixels=28 * 28)  # tiny: only to check that it decodes
STARTS = 5  # attempts to start a decoder: what kills processes may kill one that is just starting
DEATHS = 2  # of decoders that had a single image, before it is left for another run
_BATCH_IMAGES = 16  # images per message: at 112 pixels a message costs a good part of a decode
_BATCH_BYTES = 256 << 10


def decode_batch(
    images: Batch, *, decode: Callable[[bytes], Result | ImageProblem]
) -> tuple[list[Result | ImageProblem], float]:
    """Runs in the worker; one result per image, and the seconds they took. An image's error becomes its problem.

    Out of memory says nothing about the image: a ``read_error``, like anything that kills the process. Raises RunFailed
    for a format whose decoder is not installed.
    """
    started = time.perf_counter()
    results: list[Result | ImageProblem] = []
    for data in images:
        try:
            results.append(decode(data))
        except RunFailed:  # a decoder that is not installed: nothing about the image
            raise
        except MemoryError as error:
            results.append(ImageProblem(Status.READ_ERROR, f"out of memory: {error}".rstrip(": ")))
        except Exception as error:  # a decoder's bug: recorded in the row, the others go on
            results.append(ImageProblem(Status.CORRUPT, f"cannot be decoded: {type(error).__name__}: {error}"))
    return results, time.perf_counter() - started


def grid_decoder(
    grid: ImageGrid, limits: ImageLimits, *, dct_scaling: bool = True
) -> Callable[[bytes], Pixels | ImageProblem]:
    """A decoder to a vision-language model's pixel grid, for a pool. Raises BadInput where no size fits the grid."""
    try:
        grid_size(grid.factor, grid.factor, grid)
    except ValueError as error:
        raise BadInput(f"the model's pixel limits cannot be met: {error}") from None
    return functools.partial(decode_rgb, grid=grid, limits=limits, dct_scaling=dct_scaling)


def check_for_server(data: bytes, *, limits: ImageLimits) -> bytes | ImageProblem:
    """Bytes to send to a server instead of a valid image's own; empty where it gets those."""
    small = decode_rgb(data, _CHECK_GRID, limits)
    if isinstance(small, ImageProblem):
        return small
    return b"" if is_plain(data) else plain_copy(data, limits)


@dataclass(frozen=True, slots=True)
class _Job(Generic[Result]):
    data: bytes
    future: asyncio.Future[Result | ImageProblem]


class DecodePool(Generic[Result]):
    """Runs ``decode`` on images in ``workers`` processes, with at most ``in_flight`` images queued or being decoded.

    ``decode`` must be importable there: a module's function, or a partial of one with picklable arguments.

    A decoder that dies is replaced, and images that shared its message are retried one by one; see
    :meth:`Decoder.alone`. Use from one event loop; ``busy_seconds`` ÷ (workers × wall time) is the utilisation of the
    workers.
    """

    def __init__(
        self, workers: int, decode: Callable[[bytes], Result | ImageProblem], *, in_flight: int | None = None
    ) -> None:
        self.workers = workers
        self.busy_seconds = 0.0
        self._slots = asyncio.Semaphore(in_flight or 2 * _BATCH_IMAGES * workers)
        self._jobs: queue.SimpleQueue[_Job[Result] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._lanes = [_Lane(self, Decoder(decode)) for _ in range(workers)]

    async def decode(self, data: bytes) -> Result | ImageProblem:
        """The result of ``decode`` for the image, or its problem. Raises RunFailed where no worker starts."""
        async with self._slots:
            if self._closed:
                raise RunFailed("the decoding pool is closed")
            future: asyncio.Future[Result | ImageProblem] = asyncio.get_running_loop().create_future()
            self._jobs.put(_Job(data, future))
            return await future

    def close(self) -> None:
        """Stop the processes at once; waiting images fail with RunFailed."""
        self._closed = True
        for lane in self._lanes:
            lane.decoder.kill()
        for _ in self._lanes:
            self._jobs.put(None)
        for lane in self._lanes:
            lane.thread.join()
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                _settle([job], RunFailed("the decoding pool is closed"))

    def _take(self) -> list[_Job[Result]] | None:
        """Jobs for one message: never more than a fair share, so that no lane is idle beside a long message."""
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
                self._jobs.put(None)  # the stop signal is for all lanes; these jobs come first
                break
            jobs.append(job)
            size += len(job.data)
        return jobs

    def _count(self, seconds: float) -> None:
        with self._lock:
            self.busy_seconds += seconds


class Decoder(Generic[Result]):
    """A decoding process, replaced when it dies. For use by one thread, except :meth:`kill`."""

    def __init__(self, decode: Callable[[bytes], Result | ImageProblem]) -> None:
        self._function = functools.partial(decode_batch, decode=decode)
        self._worker: Worker[Batch, tuple[list[Result | ImageProblem], float]] = Worker(self._function)
        self._killed = False

    def await_start(self) -> None:
        """Call before the first image. Raises RunFailed where the process does not start, even after retries."""
        for left in reversed(range(STARTS)):
            try:
                return self._worker.wait_ready()
            except Exception as error:  # a failed import can raise anything; it fails the run, not an image
                if not left or self._killed or not isinstance(error, WorkerDiedError):
                    raise RunFailed(f"an image decoding process did not start: {error}") from error
            self._fresh()

    def batch(self, images: Batch) -> tuple[list[Result | ImageProblem], float]:
        """Like :func:`decode_batch`. Raises WorkerDiedError; call :meth:`replace` before the next batch then."""
        self._worker.send(images)
        return self._worker.recv(timeout=SECONDS_PER_IMAGE * len(images))

    def alone(self, image: bytes, deaths: int = 0) -> tuple[Result | ImageProblem, float]:
        """One image, and the seconds it took: in a fresh process where one died on it, or ran out of memory.

        What kills a process (the kernel, where memory runs out) may have nothing to do with the image, and a slow
        machine does not mean a damaged file: after :data:`DEATHS` deaths it is a ``read_error``, to be retried by
        another run.
        """
        while True:
            try:
                (result,), seconds = self.batch([image])
                if not _is_passing(result):
                    return result, seconds
                reason = result.reason
            except WorkerDiedError as death:
                reason = f"the decoder died: {death}"
            deaths += 1
            self.replace()
            if deaths >= DEATHS:
                return ImageProblem(Status.READ_ERROR, f"cannot be decoded now, tried {deaths} times: {reason}"), 0.0

    def replace(self) -> None:
        """Start a fresh process. Raises RunFailed where none starts, or where this one was killed by us."""
        self._fresh()
        self.await_start()

    def _fresh(self) -> None:
        self._worker.kill()
        if not self._killed:
            self._worker = Worker(self._function)
        if self._killed:  # perhaps killed meanwhile
            self._worker.kill()
            raise RunFailed("the decoding pool is closed")

    def close(self) -> None:
        """End the process once its current images are done."""
        self._worker.close()

    def kill(self) -> None:
        """End the process at once, from any thread."""
        self._killed = True
        self._worker.kill()


def _is_passing(result: object) -> TypeGuard[ImageProblem]:
    return isinstance(result, ImageProblem) and result.status is Status.READ_ERROR


class _Lane(Generic[Result]):
    """One thread and its decoder: takes jobs, has them decoded, settles their futures."""

    def __init__(self, pool: DecodePool[Result], decoder: Decoder[Result]) -> None:
        self._pool, self.decoder = pool, decoder
        self.thread = threading.Thread(target=self._run, name="capipe-decode", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        broken: RunFailed | None = None
        try:
            self.decoder.await_start()
        except RunFailed as error:
            broken = error
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
        self.decoder.close()

    def _decode(self, jobs: list[_Job[Result]]) -> None:
        try:
            results, seconds = self.decoder.batch([job.data for job in jobs])
            self._pool._count(seconds)
            again = [index for index, result in enumerate(results) if _is_passing(result)]
        except WorkerDiedError:
            again = list(range(len(jobs)))
        else:
            sound = [index for index in range(len(jobs)) if index not in again]
            _settle([jobs[index] for index in sound], [results[index] for index in sound])
        if again:
            self.decoder.replace()
        for index in again:
            result, seconds = self.decoder.alone(jobs[index].data, deaths=len(jobs) == 1)
            self._pool._count(seconds)
            _settle([jobs[index]], [result])


def _settle(jobs: Sequence[_Job[Result]], outcome: Sequence[Result | ImageProblem] | Exception) -> None:
    """Set results (or one error for all) on the futures, in their own loop and with a single wake-up of it."""

    def deliver() -> None:
        for index, job in enumerate(jobs):
            if job.future.done():  # its caller was cancelled
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome[index])

    if not jobs:
        return
    with contextlib.suppress(RuntimeError):  # the loop is closed: no caller is waiting
        jobs[0].future.get_loop().call_soon_threadsafe(deliver)
