"""How many requests a server gets: the search by itself, and against servers that take few, many, or queue."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from capipe.models.engines.base import GenerationRequest, Prompt, Sampling
from capipe.models.engines.http import limits as http_limits
from capipe.models.engines.http.engine import connect_http_engine
from capipe.models.engines.http.limits import AdaptiveLimit, Limiter, pays, room_for_connections

from ..chat_server import options

ASK = GenerationRequest(Prompt("Describe."), Sampling(max_tokens=7))
ANSWER = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}


class Room:
    """A server in this process: answers after ``seconds``, queues beyond ``batch`` and refuses beyond ``most``."""

    def __init__(self, most: int, batch: int, seconds: float) -> None:
        self.most, self.seats, self.seconds = most, asyncio.Semaphore(batch), seconds
        self.present = self.peak = self.refused = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = [line for line in head.split("\r\n") if line.startswith("content-length:")]
                if length:
                    await reader.readexactly(int(length[0].split(":")[1]))
                status, content = await self.answer() if length else (200, {"data": [{"id": "m", "owned_by": "vllm"}]})
                data = json.dumps(content).encode()
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self) -> tuple[int, dict[str, object]]:
        if self.present >= self.most:
            self.refused += 1
            return 429, {"error": {"message": "too many"}}
        self.present += 1
        self.peak = max(self.peak, self.present)
        try:
            async with self.seats:
                await asyncio.sleep(self.seconds)
        finally:
            self.present -= 1
        return 200, ANSWER


@asynccontextmanager
async def room(most: int = 10_000, batch: int = 10_000, seconds: float = 0.05) -> AsyncIterator[tuple[Room, str]]:
    made = Room(most, batch, seconds)
    server = await asyncio.start_server(made.connected, "127.0.0.1", 0, backlog=2048)
    try:
        yield made, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_a_server_that_takes_eight_gets_about_eight_and_no_request_fails() -> None:
    async with room(most=8) as (server, url):
        engine = await connect_http_engine(options(url, attempts=1))
        answers = await asyncio.gather(*(engine.generate(ASK) for _ in range(600)))
        limit = engine.concurrency
        await engine.aclose()
    assert len(answers) == 600 and 7 <= limit <= 9
    assert server.peak == 8 and server.refused < 100  # some 30: it is asked for what it takes


@pytest.mark.slow
async def test_a_server_with_room_gets_hundreds() -> None:
    async with room(seconds=3.0) as (server, url):  # long enough for one process to send hundreds meanwhile
        engine = await connect_http_engine(options(url, timeout_s=60.0))
        assert engine.concurrency == http_limits.START
        await asyncio.gather(*(engine.generate(ASK) for _ in range(1000)))
        grown = engine.concurrency
        await engine.aclose()
    assert server.peak >= 256 and grown >= 128 and server.refused == 0


async def test_a_fixed_number_stays_what_it_is() -> None:
    async with room(most=3) as (server, url):
        engine = await connect_http_engine(options(url, concurrency=5, attempts=1))
        await asyncio.gather(*(engine.generate(ASK) for _ in range(40)))
        assert engine.concurrency == 5
        await engine.aclose()
    assert server.peak == 3 and server.refused > 0


# --- the search, against a server that is a function -----------------------------------------------------------------


def simulated(latency: Callable[[int], float], most: int, rounds: int, limit: AdaptiveLimit) -> list[int]:
    """The limits over so many rounds at a server with this latency by load, that refuses more than ``most`` at once."""
    seen = list[int]()
    for _ in range(rounds):
        generation, value = limit.generation, limit.value
        limit.full()
        for _ in range(max(0, value - most)):
            limit.refused(generation)
        for _ in range(min(value, most)):
            limit.answered(generation, latency(value))
        seen.append(limit.value)
    return seen


def test_growth_goes_on_as_long_as_batches_pay() -> None:
    seen = simulated(lambda load: 1.0 + load / 2000, 10_000, 40, AdaptiveLimit())
    assert seen[:3] == [64, 128, 256] and seen[-1] == http_limits.MOST


def test_a_server_that_only_queues_is_not_flooded() -> None:
    seen = simulated(lambda load: max(1.0, load / 256), 10_000, 400, AdaptiveLimit())
    assert max(seen[30:]) < 400 and min(seen[30:]) >= 128


def test_refusals_find_the_level_from_above_and_it_is_kept() -> None:
    seen = simulated(lambda load: 1.0, 8, 400, AdaptiveLimit())
    assert all(4 <= value <= 12 for value in seen[10:]) and sum(seen[10:]) / len(seen[10:]) >= 7.5


def test_a_server_that_gets_more_room_is_given_more() -> None:
    limit = AdaptiveLimit()
    simulated(lambda load: 1.0, 8, 50, limit)
    assert simulated(lambda load: 1.0, 10_000, 60, limit)[-1] >= 1024


def test_what_is_not_asked_for_does_not_raise_the_limit() -> None:
    limit = AdaptiveLimit()
    for _ in range(1000):
        limit.answered(limit.generation, 1.0)
    assert limit.value == http_limits.START


def test_requests_of_an_earlier_limit_say_nothing() -> None:
    limit = AdaptiveLimit()
    before = limit.generation
    for _ in range(24):
        limit.refused(before)
    assert limit.value == http_limits.START // 2


def test_throughput_decides() -> None:
    assert pays((64, 1.0), (128, 1.8)) and not pays((64, 1.0), (128, 1.95))
    assert pays((100, 1.0), (110, 5.0))  # too close to tell


# --- the line --------------------------------------------------------------------------------------------------------


async def test_who_was_refused_keeps_its_place() -> None:
    limiter, order = Limiter(1), list[int]()

    async def one(place: int) -> None:
        async with limiter.slot(place):
            order.append(place)
            await asyncio.sleep(0)

    async with limiter.slot(0):
        tasks = [asyncio.create_task(one(place)) for place in (5, 6, 1)]
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    assert order == [1, 5, 6]


async def test_a_turn_that_nobody_waits_for_any_more_is_passed_on() -> None:
    limiter = Limiter(1)

    async def one() -> None:
        async with limiter.slot(0):
            pass

    async with limiter.slot(0):
        gone, waiting = asyncio.create_task(one()), asyncio.create_task(one())
        await asyncio.sleep(0.01)
        gone.cancel()
    await asyncio.wait_for(waiting, 5)
    assert gone.cancelled()


async def test_shutting_sends_all_away_until_it_is_open_again() -> None:
    limiter = Limiter(1)

    async def one() -> None:
        async with limiter.slot(0):
            pass

    async with limiter.slot(0):
        waiting, sleeping = asyncio.create_task(one()), asyncio.create_task(limiter.sleep(60))
        await asyncio.sleep(0.01)
        limiter.shut(lambda: OSError("gone"))
        for task in (waiting, sleeping, asyncio.create_task(one())):
            with pytest.raises(OSError, match="gone"):
                await asyncio.wait_for(task, 5)
    limiter.reopen()
    await one()


def test_connections_keep_within_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1024, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, to: limits.__setitem__(0, to[0]))
    assert room_for_connections(2048) == 512  # nothing to be raised
    limits[1] = 4096
    assert room_for_connections(2048) == 2048 and limits[0] == 4096
