"""Several servers as one engine: who is asked, who is left out, who comes back."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import (
    ChoiceRequest,
    Engine,
    EngineDead,
    GenerationRequest,
    ImageInput,
    Prompt,
    RequestError,
    Sampling,
)
from capipe.models.engines.http.engine import HTTPOptions
from capipe.models.engines.http.server import served_model, server_urls
from capipe.models.engines.loading import EngineConfig, load_engine, model_identity
from capipe.models.engines.router import EngineRouter, Failover, connect_servers

from ...conftest import photo
from ..chat_server import Answer, Double, completion, options, serving

QUICK = Failover(patience=0.2, probe=0.05, longest_probe=0.2, gone=0.3)
PHOTO = photo(1)


def short(answer: Answer) -> Answer:
    """Over a connection that ends with it, so that a server that is closed is gone."""
    status, headers, content = answer
    return status, {**headers, "connection": "close"}, content


def well(n: int, body: dict[str, Any]) -> Answer:
    return short(completion("x"))


def busy(n: int, body: dict[str, Any]) -> Answer:
    return short((503, {}, {"message": "loading"}))


def about(uid: str) -> GenerationRequest:
    return GenerationRequest(Prompt("Describe.", ImageInput(uid, encoded=PHOTO)), Sampling(max_tokens=7))


def quick(**changes: Any) -> HTTPOptions:
    return options("", patience_s=changes.pop("patience_s", 5.0), **changes)


@asynccontextmanager
async def routed(
    *doubles: Double, failover: Failover = QUICK, all_needed: bool = False, **changes: Any
) -> AsyncIterator[EngineRouter]:
    async with AsyncExitStack() as stack:
        urls = [stack.enter_context(serving(double)) for double in doubles]
        engine = await connect_servers(quick(**changes), urls, failover=failover, all_needed=all_needed)
        stack.push_async_callback(engine.aclose)
        assert isinstance(engine, EngineRouter) and isinstance(engine, Engine)
        yield engine


async def ask_all(engine: EngineRouter, count: int) -> list[str]:
    answers = await asyncio.gather(*(engine.generate(about(f"image {n}")) for n in range(count)))
    return [answer.text for answer in answers]


async def test_each_image_has_its_server_and_each_server_its_share() -> None:
    doubles = [Double(well), Double(well), Double(well)]
    async with routed(*doubles) as engine:
        await ask_all(engine, 60)
        shares = [len(double.bodies) for double in doubles]
        assert sum(shares) == 60 and min(shares) >= 8
        for _ in range(5):  # again and again the same one
            await engine.generate(about("image 0"))
        grown = [len(double.bodies) - share for double, share in zip(doubles, shares, strict=True)]
        assert sorted(grown) == [0, 0, 5]


async def test_questions_about_a_caption_go_where_its_beginning_was_computed() -> None:
    top = [{"token": "A", "logprob": -0.1}]
    answer = short(completion("A", "length", {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": top}]}))
    doubles = [Double(lambda n, body: answer), Double(lambda n, body: answer)]
    async with routed(*doubles) as engine:
        for question in range(6):
            await engine.choose(ChoiceRequest(Prompt(f"<caption>A dog.</caption>\n\nQuestion: {question}"), ("A", "B")))
    assert sorted(len(double.bodies) for double in doubles) == [0, 6]


async def test_what_all_share_does_not_pile_up_at_one_server() -> None:
    doubles = [Double(lambda n, body: well(n, body)), Double(well)]
    async with routed(*doubles, concurrency=2) as engine:
        asked = [GenerationRequest(Prompt(f"Answer.\n\nQuestion: {n}")) for n in range(80)]
        await asyncio.gather(*map(engine.generate, asked))
    assert min(len(double.bodies) for double in doubles) >= 20


async def test_a_server_that_dies_is_left_out_and_no_request_fails(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Double(well), Double(well)
    with serving(second) as other, serving(first) as url:
        engine = await connect_servers(quick(concurrency=8), [url, other], failover=QUICK)
        assert await ask_all(engine, 20) == ["x"] * 20
        port = int(url.rsplit(":", 1)[1])
    # Both are closed now. The second one comes back on its port, the first stays away.
    with serving(second, int(other.rsplit(":", 1)[1])):
        assert await ask_all(engine, 30) == ["x"] * 30
        assert engine.concurrency in range(1, 9)
        left_out = [record for record in caplog.records if "is left out" in record.message and url in record.message]
        assert len(left_out) == 1
        with serving(first, port):  # it is back, and gets its images again
            before = len(first.bodies)
            async with asyncio.timeout(20):
                while len(first.bodies) == before:
                    await ask_all(engine, 10)
                    await asyncio.sleep(0.05)
        assert any("is back" in record.message and url in record.message for record in caplog.records)
    with pytest.raises(EngineDead, match="none of the servers is left"):
        async with asyncio.timeout(60):
            while True:
                await ask_all(engine, 4)
    await engine.aclose()


async def test_a_server_that_is_busy_for_long_is_left_out_and_taken_back() -> None:
    stuck, fine = Double(busy), Double(well)
    async with routed(stuck, fine) as engine:
        assert await ask_all(engine, 20) == ["x"] * 20
        assert len(fine.bodies) >= 20
        stuck.answers = well
        before = len(stuck.bodies)
        async with asyncio.timeout(20):
            while len(stuck.bodies) < before + 3:
                await ask_all(engine, 10)
                await asyncio.sleep(0.05)


async def test_all_of_them_busy_is_waited_for() -> None:
    one, other = Double(busy), Double(busy)
    async with routed(one, other) as engine:
        task = asyncio.create_task(ask_all(engine, 6))
        await asyncio.sleep(1.0)
        one.answers = well
        assert await asyncio.wait_for(task, 30) == ["x"] * 6
    async with routed(Double(busy), Double(busy), patience_s=1.0) as engine:
        with pytest.raises((RequestError, EngineDead), match=r"busy for|none of the servers"):
            await ask_all(engine, 1)


async def test_servers_that_restart_together_are_waited_for() -> None:
    one, other = Double(busy), Double(busy)
    async with routed(one, other) as engine:
        one.status = other.status = 503  # not even their models are told
        task = asyncio.create_task(ask_all(engine, 6))
        await asyncio.sleep(1.5)
        assert not task.done()
        other.answers, other.status = well, 200
        assert await asyncio.wait_for(task, 30) == ["x"] * 6


async def test_a_request_that_breaks_every_server_is_its_own_fault() -> None:
    def picky(n: int, body: dict[str, Any]) -> Answer:
        return short((500, {}, {"message": "no such thing"}) if "poison" in str(body) else completion("x"))

    doubles = [Double(picky), Double(picky)]
    async with routed(*doubles) as engine:
        for _ in range(3):
            bad = asyncio.create_task(engine.generate(GenerationRequest(Prompt("poison"))))
            while not bad.done():  # the others go on meanwhile
                await ask_all(engine, 4)
            with pytest.raises(RequestError, match="no such thing"):
                bad.result()
        assert engine.concurrency > 1
        one, other = (len([body for body in double.bodies if "poison" in str(body)]) for double in doubles)
        assert one >= 2 and other >= 2  # both were tried


async def test_a_refusal_that_all_share_is_told_and_one_servers_own_is_not() -> None:
    def refused(n: int, body: dict[str, Any]) -> Answer:
        return short((401, {}, {"message": "no such key"}))

    async with routed(Double(refused), Double(well)) as engine:
        assert await ask_all(engine, 10) == ["x"] * 10
    async with routed(Double(refused), Double(refused)) as engine:
        with pytest.raises(RequestError, match="no such key") as caught:
            await ask_all(engine, 1)
        assert caught.value.final


# --- at the start ----------------------------------------------------------------------------------------------------


async def test_one_of_two_down_is_one_warning_and_it_is_taken_in_later(
    unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    here, late = Double(well), Double(well)
    nobody = f"http://127.0.0.1:{unused_tcp_port}"
    with serving(here) as url, caplog.at_level(logging.WARNING):
        engine = await connect_servers(quick(), [nobody, url], failover=QUICK)
        warned = [record.message for record in caplog.records]
        assert len(warned) == 1 and "1 of 2 servers are down" in warned[0] and nobody in warned[0]
        assert served_model(f"{nobody},{url}") == "captioner"
        assert await ask_all(engine, 10) == ["x"] * 10 and len(here.bodies) == 10
        with serving(late, unused_tcp_port):
            async with asyncio.timeout(20):
                while not late.bodies:
                    await ask_all(engine, 10)
                    await asyncio.sleep(0.05)
            await engine.aclose()
        with pytest.raises(BadInput, match="no server answers"):  # all are needed where weights change
            await connect_servers(quick(), [nobody, url], all_needed=True)


async def test_all_down_and_different_models_are_bad_input(unused_tcp_port_factory: Callable[[], int]) -> None:
    down = ",".join(f"http://127.0.0.1:{unused_tcp_port_factory()}" for _ in range(2))
    for refuse in (lambda: load_engine(EngineConfig(down)), lambda: asyncio.to_thread(served_model, down)):
        with pytest.raises(BadInput, match=r"none of the servers answers: .*; "):
            await refuse()
    one, other = Double(well), Double(well)
    other.model = "else"
    with serving(one) as first, serving(other) as second:
        for refuse in (
            lambda: load_engine(EngineConfig(f"{first}, {second}")),
            lambda: asyncio.to_thread(served_model, f"{first},{second}"),
        ):
            with pytest.raises(BadInput, match=r"different models .*'captioner'.*'else'"):
                await refuse()
        with pytest.raises(BadInput, match="does not serve 'captioner'"):
            await load_engine(EngineConfig(f"{first},{second}", "captioner"))
        shared = await load_engine(EngineConfig(f"{first},{second}", "other"))  # both have it, too
        await shared.aclose()


def test_the_identity_is_the_models_and_not_the_servers() -> None:
    with serving(Double(well)) as one, serving(Double(well)) as other:
        assert model_identity("", one) == model_identity("", f"{other},{one}") == model_identity("captioner", other)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("http://a:9,,http://b", "'' is no URL"),
        ("http://a:9,", "'' is no URL"),
        ("http://a:9,b:8000", "'b:8000' is no http"),
        ("http://a:9,vllm", "'vllm' is no http"),
        ("http://a:nine", "'http://a:nine' is no URL"),
        ("http://a:99999", "'http://a:99999' is no URL"),
        ("http://", "'http://' names no host"),
        ("http://a b", "'http://a b'"),
        ("http://a/v1?key=1", "has a query"),
        ("http://a:9,http://a:9/v1/", "names 'http://a:9/v1/' twice"),
    ],
)
def test_each_url_is_looked_at(option: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        EngineConfig(option)


def test_urls_may_have_spaces_between_them() -> None:
    assert server_urls("http://a:9, https://b/v1") == ("http://a:9", "https://b/v1")


# --- new weights -----------------------------------------------------------------------------------------------------


async def test_new_weights_go_to_all_and_a_server_without_them_is_not_asked() -> None:
    def answers(n: int, body: dict[str, Any]) -> Answer:
        if "messages" in body:
            return short(completion("x"))
        return short((200, {}, {"success": True}))

    one, other = Double(answers), Double(answers)
    with serving(one) as first:
        with serving(other) as second:
            engine = await connect_servers(quick(), [first, second], all_needed=True)
            assert isinstance(engine, EngineRouter)
            await engine.reload(Path("weights"))
            assert Counter(one.paths) == Counter(other.paths) and len(one.paths) == 4
            port = int(second.rsplit(":", 1)[1])
        assert await ask_all(engine, 20) == ["x"] * 20  # the other one is gone in the middle of a step
        with pytest.raises(EngineDead, match=second):
            await engine.reload(Path("weights"))
        with serving(other, port):
            sent = len(other.bodies)
            assert await ask_all(engine, 20) == ["x"] * 20
            assert len(other.bodies) == sent  # it is back, but nobody knows with which weights
            await engine.reload(Path("weights"), everything=False)
            # One that was gone may have been started anew, and needs the frozen weights, too.
            told = [[body["args"] for body in double.bodies if "args" in body] for double in (one, other)]
            assert [each[-1] for each in told] == [["weights", False], ["weights", True]]
            assert await ask_all(engine, 20) == ["x"] * 20
            assert len(other.bodies) > sent + 4
            await engine.aclose()


async def test_servers_of_different_types_are_refused() -> None:
    def computing(dtype: str) -> Double:
        types = {"weights": dtype, "head": "float32"}
        return Double(lambda n, body: short((200, {}, {"results": [types]})))

    with serving(computing("float32")) as first, serving(computing("bfloat16")) as second:
        engine = await connect_servers(quick(), [first, second], all_needed=True)
        assert isinstance(engine, EngineRouter)
        with pytest.raises(BadInput, match=r"compute in different types .* start all with the same --dtype"):
            await engine.precision()
        await engine.aclose()
